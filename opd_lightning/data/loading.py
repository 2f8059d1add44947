"""Prompts with their ids, checked against all that will read them; tasks with their questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning import preflight
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.suites import EvaluationSuite, LikelihoodSuite, Loaded, Suite
from opd_lightning.errors import UserError, note
from opd_lightning.harness.exam import Exam
from opd_lightning.harness.questions import Reader
from opd_lightning.harness.task import HarnessTask

if TYPE_CHECKING:
    from opd_lightning.data.datamodule import RolloutDataModule


def load_training(data: RolloutDataModule) -> Loaded:
    """The prompts to train on, for every author and every teacher."""
    if data.train is None:
        raise UserError("data.train: got nothing, expected a prompt file to train on")
    files = {"data.train": data.train}
    for name, suite in data.suites["validate"].items():
        if not isinstance(suite, HarnessTask):
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


def load_suite(data: RolloutDataModule, name: str, suite: Suite) -> Loaded | Exam:
    """What a suite measures, checked."""
    if not isinstance(suite, HarnessTask):
        return _load_prompts(data, suite)
    source = data.module.student.source
    reader = Reader(
        tokenizer=source.tokenizer,
        template_args=data.template_args,
        context_length=source.context_length,
    )
    exam = Exam.prepare(name, suite, reader)
    if exam.shortened and Ranks.of(data.trainer).rank == 0:
        asked = len(exam.readings) + len(exam.writings)
        note(
            f"data.tasks.{name}: {exam.shortened} of {asked} questions are cut on the left to fit "
            f"the student's context of {reader.context_length} tokens"
        )
    return exam


def _load_prompts(data: RolloutDataModule, suite: EvaluationSuite | LikelihoodSuite) -> Loaded:
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
