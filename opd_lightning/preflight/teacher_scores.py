"""Checks of the teachers' log-probs on the student's responses, and of remote against local."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opd_lightning.errors import reason_of
from opd_lightning.models.source import ModelSource
from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.probe import Probe
from opd_lightning.teachers.base import Ask, Provides, Teacher
from opd_lightning.teachers.by_domain import ByDomainTeacher
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.types import Rollout, RolloutBatch, TokenScores

# A lower mean log-prob, in nats, means text unlike the training data; with a small vocabulary,
# the bound is a nat below uniform guessing.
LOWEST_MEAN = -8.0
# Two copies of one model in different precisions differ by less on the mean token.
COPY_GAP = 0.1  # nats


def check_teachers(probe: Probe, rollouts: list[Rollout], *, compare: bool) -> list[Finding]:
    """Return a finding for each distinct ask of the method, and for each comparison.

    Args:
        probe: The run.
        rollouts: Rollouts that the teachers score.
        compare: Load the weights of remote teachers, and compare.
    """
    findings = []
    asked = probe.module.asked_top_k()
    names: dict[Ask, list[str]] = {}
    for name, ask in probe.module.all_asks().items():
        names.setdefault(ask, []).append(name)
    for ask, roles in names.items():
        role, top_k = " and ".join(roles), max(asked[name] for name in roles)
        try:
            _ask(probe, ask, rollouts, top_k)  # a teacher's first answer takes longest
            ask.teacher.release()
            with probe.clock("teachers"):
                answers = _ask(probe, ask, rollouts, top_k)
        except (ValueError, RuntimeError) as error:
            findings.append(Finding("error", role, reason_of(error, 400)))
            continue
        findings.append(_check_scores(probe, role, ask, answers))
        if compare and (twin := _local_twin(ask.teacher)) is not None:
            findings.append(_compared(probe, role, Ask(twin, ask.view), answers))
    return findings


_Answers = list[tuple[RolloutBatch, TokenScores]]


@torch.no_grad()
def _signal(probe: Probe, answers: _Answers) -> Tensor:
    """Return d_t of every response token under the student's prompt, `[N]` nats."""
    parts = [(s.logprobs - probe.logprobs(b))[b.response_mask] for b, s in answers]
    return torch.cat(parts)


def _ask(probe: Probe, ask: Ask, rollouts: list[Rollout], top_k: int) -> _Answers:
    batches = probe.batches(rollouts)
    for batch in batches:
        ask.teacher.prefetch(batch, ask.view, top_k=top_k)
    return [(batch, ask.teacher.score(batch, ask.view, top_k=top_k)) for batch in batches]


def _check_scores(probe: Probe, role: str, ask: Ask, answers: _Answers) -> Finding:
    wrong = next((s for b, s in answers if s.logprobs.shape != b.response_mask.shape), None)
    if wrong is not None:
        return Finding(
            "error",
            role,
            f"{type(ask.teacher).__name__} answers in shape {list(wrong.logprobs.shape)}, "
            f"expected {list(answers[0][0].response_mask.shape)}",
            "its log-probs belong to other tokens",
            "let its `score` return [B, R]",
        )
    logprobs = torch.cat([s.logprobs[_asked(b, ask.view)] for b, s in answers])
    if not len(logprobs):
        return Finding("info", role, f"no response of the probe has the view {ask.view!r}")
    if not logprobs.isfinite().all():
        return Finding(
            "error",
            role,
            f"{int((~logprobs.isfinite()).sum()):,} of {len(logprobs):,} log-probs are infinite "
            "or NaN",
            "the loss would be NaN",
            "check its weights and dtype (float16 overflows)",
        )
    source = ask.teacher.source or probe.module.student.source
    floor = max(LOWEST_MEAN, -math.log(source.config.get_text_config().vocab_size) - 1)
    mean = float(logprobs.mean())
    values = {"logprob_mean": mean, "logprob_min": float(logprobs.min())}
    found = f"{mean:.2f} nats a token (mean), {values['logprob_min']:.1f} (least), view {ask.view}"
    if ask == probe.module.all_asks().get("teacher") and ask.view == "student":
        signal = _signal(probe, answers)
        values["d_mean"] = float(signal.mean())
        if not signal.any():
            return Finding(
                "warning",
                role,
                "it says of every token what the student says",
                "it is the student itself, under the same prompt: there is nothing to learn",
                "check its path, or give it a view of its own",
                values,
            )
    if mean >= floor:
        return Finding("ok", role, found, values=values)
    return Finding(
        "warning",
        role,
        found,
        f"below {floor:.1f}: no model says so of text in a form that it knows",
        "check its path and chat template; a student this weak needs supervised training first",
        values,
    )


def _compared(probe: Probe, role: str, ask: Ask, answers: _Answers) -> Finding:
    """Compare a remote teacher with its own weights, loaded in this process."""
    subject = f"{role} from disk"
    try:
        ask.teacher.load(probe.module.device, probe.module.student)
        here = [ask.teacher.score(batch, ask.view).logprobs for batch, _ in answers]
    except (ValueError, RuntimeError, OSError) as error:
        reason = reason_of(error)
        return Finding("info", subject, f"not compared, its weights do not load here: {reason}")
    gaps = torch.cat(
        [
            (there.logprobs - own)[_asked(batch, ask.view)].abs()
            for (batch, there), own in zip(answers, here, strict=True)
        ]
    )
    mean, largest = float(gaps.mean()), float(gaps.max())
    values = {"gap_mean": mean, "gap_max": largest}
    found = f"log-probs differ by {mean:.2g} nats (mean), {largest:.2g} (largest)"
    if mean <= COPY_GAP:
        return Finding("ok", subject, found, values=values)
    return Finding(
        "warning",
        subject,
        found,
        "more than rounding: the server has other weights, quantised ones, or reads other prompts",
        "start it from the folder that the configuration names",
        values,
    )


def _local_twin(teacher: Teacher) -> Teacher | None:
    """Return the teacher with its remote parts in this process; None if it has no such parts."""
    if teacher.provides is Provides.TOP_K and isinstance(teacher.source, ModelSource):
        source = teacher.source
        return FrozenTeacher(source.path, trust_remote_code=source.trust_remote_code)
    if isinstance(teacher, ByDomainTeacher):
        twins: Mapping[str, Teacher | None] = {
            domain: _local_twin(one) for domain, one in teacher.teachers.items()
        }
        if any(twins.values()):
            return ByDomainTeacher({d: twins[d] or one for d, one in teacher.teachers.items()})
    return None


def _asked(batch: RolloutBatch, view: str) -> Tensor:
    """Return `[B, R]`, true for response tokens of rows that have the view."""
    return batch.response_mask & batch.views[view].available[:, None]
