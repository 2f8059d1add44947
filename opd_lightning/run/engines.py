"""Sequence lengths that engines are started for, and checks of engine settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Loaded
from opd_lightning.types import Author

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule


def plan_engines(data: RolloutDataModule, train: Loaded | None, evaluated: Iterable[int]) -> None:
    """Plan every engine for the longest sequence that a stream may request from it.

    An engine from which nothing is requested is not planned.

    Args:
        data: The run's data, with the engines.
        train: Prompts to train on; None without training.
        evaluated: Tokens of the longest prompt with its response, of each suite that samples.
    """
    lengths = list(evaluated)
    if train is not None and data.mix.samples:
        lengths.append(_longest_prompt(data, train) + data.sampling.max_new_tokens)
    if data.engine is not None and lengths:
        data.engines.plan(Author.STUDENT, data.module.student.source, max(lengths))
    if train is not None and data.teacher is not None and data.mix.teacher:
        budget = data.teacher.sampling_of(data.sampling).max_new_tokens
        most = max(map(len, train.ids)) + budget
        data.engines.plan(Author.TEACHER, data.teacher.source, most)


def _longest_prompt(data: RolloutDataModule, train: Loaded) -> int:
    """Return the tokens of the longest training prompt that the student's engine reads."""
    longest = max(map(len, train.ids))
    if data.mix.guided:
        renderer = data.renderer(training=True)
        views = (renderer.view(data.mix.guided_view, prompt) for prompt in train.prompts)
        longest = max(longest, *(len(ids or ()) for ids in views))
    return longest


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
