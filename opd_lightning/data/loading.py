"""Prompts with their ids, checked against all that will read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from opd_lightning import preflight
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.suites import EvaluationSuite, Suite
from opd_lightning.errors import UserError
from opd_lightning.types import Prompt

if TYPE_CHECKING:
    from opd_lightning.data.datamodule import RolloutDataModule


class Loaded(NamedTuple):
    """Prompts, and each as the student sees it."""

    prompts: list[Prompt]
    ids: list[list[int]]


def load_training(data: RolloutDataModule) -> Loaded:
    """The prompts to train on, for every author and every teacher."""
    if data.train is None:
        raise UserError("data.train: got nothing, expected a prompt file to train on")
    files = {"data.train": data.train}
    for name, suite in data.suites["validate"].items():
        room = "validation" if isinstance(suite, EvaluationSuite) else "texts"
        files[f"data.{room}.{name}"] = suite.prompts
    data.prompt_files.agree(files, Ranks.of(data.trainer))
    prompts = data.train.load(data.prompt_files.size(data.train))
    if data.verifier is not None:
        data.verifier.check(prompts)
    renderer = data.renderer(training=True)
    ids = [renderer.plain(prompt) for prompt in prompts]
    preflight.check_prompts(
        data.module, prompts, ids, renderer, data.sampling, data.mix, data.teacher
    )
    return Loaded(prompts, ids)


def load_suite(data: RolloutDataModule, suite: Suite) -> Loaded:
    """The prompts of a suite, which the student alone reads, answered or with their responses."""
    prompts = suite.prompts.load(data.prompt_files.size(suite.prompts))
    mix, sampling = RolloutMix(recorded=1), data.sampling
    if isinstance(suite, EvaluationSuite):
        mix, sampling = RolloutMix(), suite.sampling or data.sampling
        verifier = suite.verifier or data.verifier
        if verifier is not None:
            verifier.check(prompts)
    renderer = data.renderer(training=False)
    ids = [renderer.plain(prompt) for prompt in prompts]
    preflight.check_prompts(data.module, prompts, ids, renderer, sampling, mix, training=False)
    return Loaded(prompts, ids)
