"""Checks that engine and trainer hold the same policy, and that self-distillation is a no-op."""

from __future__ import annotations

import torch

from opd_lightning.losses.reduction import aggregate
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.models.head import TokenStates
from opd_lightning.models.student import Student
from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.probe import Probe
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.types import Rollout, RolloutBatch

# Float32 passes over the same numbers differ by the order of sums only.
ZERO = 1e-4  # nats
# A mean |d_t| above rounding: bfloat16 keeps 8 bits of a logit.
ROUNDING = 0.1  # nats


def check_alignment(probe: Probe, rollouts: list[Rollout]) -> Finding:
    """Check that every view holds the sampled ids at `prompt_lengths`."""
    batches = probe.batches(rollouts)
    for batch in batches:
        rows, columns = batch.response_mask.nonzero(as_tuple=True)
        for name, view in batch.views.items():
            seen = view.input_ids[rows, view.prompt_lengths[rows] + columns]
            if not torch.equal(seen, batch.response_ids[batch.response_mask]):
                return Finding(
                    "error",
                    "alignment",
                    f"view {name!r} holds other ids than were sampled",
                    "its reader would score another text",
                    "report it: no setting should be able to do this",
                )
    names = sorted(batches[0].views)
    tokens = sum(int(batch.response_mask.sum()) for batch in batches)
    return Finding(
        "ok", "alignment", f"{tokens:,} response tokens in place under {', '.join(names)}"
    )


def check_engine(probe: Probe) -> Finding:
    """Compare the engine's log-probs of its samples with the trainer's."""
    gaps = probe.gaps(probe.own)
    mean, largest, bound = float(gaps.mean()), float(gaps.max()), probe.module.max_logprob_gap
    values = {"gap_mean": mean, "gap_max": largest, "max_logprob_gap": bound}
    found = f"gap {mean:.2g} nats (mean), {largest:.2g} (largest), bound {bound:g}"
    if mean <= bound:  # false for NaN
        return Finding("ok", "engine and trainer", found, values=values)
    return Finding(
        "error",
        "engine and trainer",
        found,
        "they hold other weights, another precision or another temperature: `opd fit` would stop "
        "at its first step",
        "check the engine's model and dtype; raise model.init_args.max_logprob_gap only if the "
        "gap is rounding",
        values,
    )


def check_seeds(probe: Probe) -> Finding:
    """Check that the same requests in reverse order give the same responses."""
    again = reversed(probe.generate(probe.requests[::-1]))
    pairs = [(r.response_ids, c.response_ids) for r, c in zip(probe.own, again, strict=True)]
    alike = sum(ours == theirs for ours, theirs in pairs)
    found = f"{alike} of {len(pairs)} responses are reproduced by the same seeds"
    values = {"alike": alike, "responses": len(pairs)}
    if alike == len(pairs):
        return Finding("ok", "seeds", found, values=values)
    exact = getattr(probe.engine, "dtype", None) == "float32"
    return Finding(
        "warning" if exact else "info",
        "seeds",
        found,
        "a run cannot be repeated or resumed sample for sample; learning does not mind"
        + ("" if exact else ", and reduced precision rounds with the company in a batch"),
        "float32, or an engine that keeps per-request seeds" if exact else "",
        values,
    )


def check_self_distillation(probe: Probe, rollouts: list[Rollout]) -> Finding:
    """Check that OPD with the student as its own teacher has no signal and no gradient."""
    student, module = probe.module.student, probe.module
    teacher = _StudentAsTeacher(student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    ratios, gradients = [], [torch.zeros_like(p) for p in parameters]
    for batch in probe.batches(rollouts):
        theirs = teacher.score(batch, "student").logprobs
        with probe.clock("student"):
            logprobs = probe.logprobs(batch)
            ratio = theirs - logprobs.detach()
            losses = Surrogate()(logprobs, ratio, batch.behaviour_logprobs, batch.on_policy)
            loss = aggregate(losses, batch.response_mask, batch.totals.all, "token-mean")
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        ratios.append(ratio[batch.response_mask])
        for total, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                total += gradient
    sizes = torch.cat(ratios).abs()
    mean, largest = float(sizes.mean()), float(sizes.max())
    norm = float(torch.nn.utils.get_total_norm(gradients))
    text = f"|d_t| {mean:.2g} nats (mean), {largest:.2g} (largest), gradient norm {norm:.2g}"
    values = {"d_max": largest, "d_mean": mean, "gradient_norm": norm}
    exact = student.dtype == "float32" and module.trainer.precision == "32-true"
    if exact and not largest <= ZERO:
        return Finding(
            "error",
            "itself as teacher",
            text,
            "the student is another model when it trains than when it is read: every signal is "
            "off by that much",
            "look for dropout or other noise in the model's code",
            values,
        )
    if not mean <= ROUNDING:
        return Finding(
            "warning",
            "itself as teacher",
            text,
            "a teacher's signal smaller than this drowns in rounding",
            "student.dtype float32 with trainer.precision bf16-mixed, or 32-true",
            values,
        )
    return Finding("ok", "itself as teacher", text, values=values)


class _StudentAsTeacher(LocalTeacher):
    """The student, read like a local teacher: in evaluation mode, without autocast."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def load(self, device: torch.device, student: Student) -> None:
        """Do nothing: the student is loaded."""

    def _read(self, batch: RolloutBatch, view: str) -> TokenStates:
        self._student.model.eval()
        try:
            return self._student.states(batch, view)
        finally:
            self._student.model.train()
