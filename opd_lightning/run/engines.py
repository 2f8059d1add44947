"""Sequence lengths that engines are started for, and checks of engine settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import EngineNeeds
from opd_lightning.types import Author

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule


def plan_engines(data: RolloutDataModule, longest: int, needs: Iterable[EngineNeeds]) -> None:
    """Plan every engine for the longest sequence that any stream may request.

    Args:
        data: The run's data, with the engines.
        longest: Tokens of the longest training prompt.
        needs: Lengths that the suites of the stage need.
    """
    needs = list(needs)
    longest = max([longest, *(need.prompt_tokens for need in needs)])
    budget = data.sampling.max_new_tokens
    if data.engine is not None:
        most = longest + max([budget, *(need.response_tokens for need in needs)])
        data.engines.plan(Author.STUDENT, data.module.student.source, most)
    if data.teacher is not None:
        most = longest + data.teacher.sampling_of(data.sampling).max_new_tokens
        data.engines.plan(Author.TEACHER, data.teacher.source, most)


def check_engines(data: RolloutDataModule, stage: str, *, evaluated: bool) -> None:
    """Check that required engines are configured and that their settings fit the run."""
    fits = stage == "fit"
    if data.engine is None and (evaluated or (fits and data.mix.samples)):
        raise UserError(
            "data.engine: got nothing, but responses must be sampled; set an engine, or train "
            "with data.mix.recorded 1 and without validation"
        )
    if data.teacher is not None and data.teacher.engine.sleep_while_training:
        raise UserError(
            "data.teacher.engine: sleep_while_training is on, but the teacher's weights, which "
            "sleeping drops, are never pushed; leave it out"
        )
    if fits and data.max_staleness:
        _check_staleness(data)


def _check_staleness(data: RolloutDataModule) -> None:
    """Check that rollouts may be written while training, by weights that are one step old."""
    if data.engine is not None and data.engine.sleep_while_training:
        raise UserError(
            "data.max_staleness: got 1, so the engine writes while the trainer works, but its "
            "sleep_while_training is on; choose one of them"
        )
    if data.mix.samples and not data.module.corrects_staleness:
        raise UserError(
            f"data.max_staleness: got 1, but {type(data.module).__name__} takes every rollout for "
            "the newest policy's; add opd_lightning.rules.TruncatedImportance (or IcePop) to its "
            "rules, or set model.init_args.surrogate.ratio_to to 'sampler'"
        )
