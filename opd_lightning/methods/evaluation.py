"""Measuring a student on suites: what `opd validate` and `opd test` log."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.data.evaluation import EvaluationBatch
from opd_lightning.data.likelihood import LikelihoodBatch
from opd_lightning.data.suites import Scores
from opd_lightning.head import Comparison, score
from opd_lightning.losses.divergence import ForwardKL
from opd_lightning.metrics.evaluation import SuiteScores
from opd_lightning.metrics.exam import ExamScores, likelihoods_of
from opd_lightning.metrics.likelihood import LikelihoodScores
from opd_lightning.run_log import write_validation
from opd_lightning.sharding import rest
from opd_lightning.student import Student
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.start import start_of
from opd_lightning.types import RolloutBatch, TokenScores


class EvaluatedModule(LightningModule):
    """Scores every suite that the DataModule streams and logs it by the suite's name."""

    student: Student
    start: LocalTeacher | None = None  # the student's, where a suite compares with it

    def __init__(self) -> None:
        super().__init__()
        self.suites: dict[str, Scores] = {}
        self.scores: dict[str, float] = {}  # of the last validation or test, as they are logged
        # Of a measurement outside of a run: the figures of every domain, by suite.
        self.scores_by_domain: dict[str, dict[str, dict[str, float]]] = {}
        self.derived: dict[str, float] = {}  # what callbacks make of them, logged with them
        self.tables: dict[str, str] = {}  # in Markdown, by tag, likewise
        self.validation_is_over = False  # of the weights as they are now

    def load_start(self) -> None:
        """Load the student's start if a suite of the stage compares with it."""
        compute_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        stage = "test" if self.trainer.state.fn == TrainerFn.TESTING else "validate"
        if self.start is None and self.trainer.datamodule.compares_with_start(stage):  # type: ignore[attr-defined]
            self.start = start_of(self.student, compute_dtype)
            self.start.load(self.trainer.strategy.root_device, self.student)

    def validation_step(
        self, batch: EvaluationBatch | LikelihoodBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        scores = self.suites[batch.suite]
        if isinstance(batch, LikelihoodBatch):
            assert not isinstance(scores, SuiteScores)
            self._read(batch.texts, scores)
        elif isinstance(scores, ExamScores):
            scores.update(batch.rollouts)
        else:
            assert isinstance(scores, SuiteScores)
            scores.update(batch.rollouts, batch.answers)

    def _read(self, texts: RolloutBatch, scores: LikelihoodScores | ExamScores) -> None:
        """One pass of each side, and of both heads in the same precision: equal ones are at 0."""
        states = self.student.states(texts, "student")
        comparisons = {}
        asked = isinstance(scores, ExamScores)
        if isinstance(scores, LikelihoodScores) and scores.compares:
            assert self.start is not None
            comparisons["start"] = Comparison(self.start.states(texts, "student"), ForwardKL())
        targets = texts.response_ids[texts.response_mask]
        with torch.autocast(targets.device.type, enabled=False):
            found = score(states, targets, top_k=int(asked), comparisons=comparisons)
        if isinstance(scores, ExamScores):
            tokens = TokenScores.unflatten(found.student, texts)
            scores.update(texts.rollouts, likelihoods_of(texts, tokens))
        else:
            logprobs = found.student.logprobs
            scores.update(logprobs, found.values.get("start", torch.zeros_like(logprobs)))

    def test_step(self, *args: Any, **kwargs: Any) -> None:
        self.validation_step(*args, **kwargs)

    def on_validation_epoch_start(self) -> None:
        self._new_suites("validate")

    def on_test_epoch_start(self) -> None:
        self._new_suites("test")

    def on_validation_epoch_end(self) -> None:
        self._log_suites("val")
        self.validation_is_over = True

    def on_test_epoch_end(self) -> None:
        self._log_suites("test")

    def _new_suites(self, stage: str) -> None:
        suites = self.trainer.datamodule.new_scores(stage)  # type: ignore[attr-defined]
        self.suites = {name: scores.to(self.device) for name, scores in suites.items()}
        self.derived, self.tables = {}, {}

    def _log_suites(self, prefix: str) -> None:
        self.scores = {
            f"{prefix}/{name}/{key}": float(value)
            for name, scores in self.suites.items()
            for key, value in scores.compute().items()
        } | self.derived
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits:  # at the number of steps made; Lightning's index is one less
            write_validation(self.trainer, self)
        else:
            self.scores_by_domain = {
                name: {
                    domain: {key: float(value) for key, value in figures.items()}
                    for domain, figures in scores.compute_by_domain().items()
                }
                for name, scores in self.suites.items()
                if isinstance(scores, SuiteScores)
            }
        self.log_dict(self.scores, logger=not fits)
        if self.start is not None:
            self.start.rest()
        if self.student.sharding is not None and any(
            not isinstance(scores, SuiteScores) and scores.reads for scores in self.suites.values()
        ):
            rest(self.student)  # it was read, and no backward pass follows
