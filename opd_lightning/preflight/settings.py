"""Findings on lengths, precisions and sampling, as configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.data.stream import TrainingStream
from opd_lightning.preflight.finding import Finding
from opd_lightning.run.model_checks import teacher_sources

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

# Mean gap in nats of float32 on both sides, at most; bfloat16 on either side exceeds it.
FLOAT32_GAP = 1e-3


def check_settings(
    module: DistillationModule, data: RolloutDataModule, stream: TrainingStream
) -> list[Finding]:
    """Return findings that need the prompts but no weights."""
    return [_lengths(module, data, stream), _precisions(module, data), _sampling(module, data)]


def _lengths(
    module: DistillationModule, data: RolloutDataModule, stream: TrainingStream
) -> Finding:
    longest = max(map(len, stream.prompt_ids))
    sources = [module.student.source, *teacher_sources(module)]
    context, role = min((source.context_length, source.role) for source in sources)
    budget = data.sampling.max_new_tokens
    return Finding(
        "ok",
        "lengths",
        f"prompts up to {longest:,} + responses up to {budget:,} tokens, "
        f"context {context:,} ({role})",
        values={"longest_prompt": longest, "max_new_tokens": budget, "context": context},
    )


def _precisions(module: DistillationModule, data: RolloutDataModule) -> Finding:
    """Compare dtypes: if engine and trainer differ, the gap is rounding, and it is large."""
    assert data.trainer is not None
    engine, precision = getattr(data.engine, "dtype", None), data.trainer.precision
    found = f"student {module.student.dtype}, trainer {precision}"
    if data.engine is None:
        return Finding("ok", "precision", found)
    found += f", engine {engine or 'elsewhere'}"
    if {module.student.dtype, engine} == {"float32"} and precision == "32-true":
        if module.max_logprob_gap <= FLOAT32_GAP:
            return Finding("ok", "precision", found)
        return Finding(
            "info",
            "precision",
            found,
            "float32 on both sides agrees to about 1e-5 nats, so the bound of "
            f"{module.max_logprob_gap} would let old weights pass",
            "model.init_args.max_logprob_gap: 1e-4",
        )
    return Finding(
        "warning" if module.max_logprob_gap <= FLOAT32_GAP else "info",
        "precision",
        found,
        "rounding alone makes a gap of some thousandths to hundredths of a nat on the mean token, "
        "many times that on unlikely ones",
        "model.init_args.max_logprob_gap: 0.1" if module.max_logprob_gap <= FLOAT32_GAP else "",
    )


def _sampling(module: DistillationModule, data: RolloutDataModule) -> Finding:
    """Report suites with other samplings, and a training that truncates."""
    sampling = data.sampling
    kept = f"top_p {sampling.top_p:g}, top_k {sampling.top_k}"
    own = f"temperature {sampling.temperature:g}, " + (
        kept if sampling.is_truncated else "the whole distribution"
    )
    if data.accept_truncation_bias:
        return Finding(
            "warning",
            "sampling",
            own,
            f"the gradient of {type(module).__name__} is that of the truncated distribution: mass "
            "moves from tokens that are never drawn to those that are; engine/kept_mass is logged",
        )
    suites = data.suites_of("validate") | data.suites_of("test")
    samplings = {name: s.own_sampling for name, s in suites.items() if s.own_sampling is not None}
    cut = {
        name: "greedy" if sampling.temperature == 0 else "truncated"
        for name, sampling in samplings.items()
        if sampling.temperature == 0 or sampling.is_truncated
    }
    if not cut:
        return Finding("ok", "sampling", own)
    return Finding(
        "info",
        "sampling",
        f"training: {own}; " + ", ".join(f"suite {name}: {how}" for name, how in cut.items()),
        "scores of these suites are not of the policy that trains",
    )
