"""The part of a method's LightningModule that measures suites and logs their scores."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.evaluation.base import Batch, Scores, Suite
from opd_lightning.losses.divergence import ForwardKL
from opd_lightning.metrics.log import write_validation
from opd_lightning.models.head import Comparison, HeadScores, score
from opd_lightning.models.sharding import reshard
from opd_lightning.models.student import Student
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.start import start_of
from opd_lightning.types import RolloutBatch


class EvaluatedModule(LightningModule):
    """LightningModule that scores the suites of the DataModule and logs them by name."""

    student: Student
    start: LocalTeacher | None = None  # initial weights, if a suite compares with them

    def __init__(self) -> None:
        super().__init__()
        self.suites: dict[str, Suite] = {}  # suites of the stage
        self.suite_scores: dict[str, Scores] = {}  # by suite
        self.scores: dict[str, float] = {}  # scores of the last validation or test, by logged name
        # Outside of a run: figures of every domain, by suite.
        self.scores_by_domain: dict[str, dict[str, dict[str, float]]] = {}
        self.derived: dict[str, float] = {}  # computed from them by callbacks, logged with them
        self.tables: dict[str, str] = {}  # Markdown by tag, from callbacks, logged with them
        self.validation_is_over = False  # for the current weights

    def load_start(self) -> None:
        """Load the student's initial weights if a suite of the stage compares with them."""
        compute_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        stage = "test" if self.trainer.state.fn == TrainerFn.TESTING else "validate"
        if self.start is None and self.trainer.datamodule.compares_with_start(stage):  # type: ignore[attr-defined]
            self.start = start_of(self.student, compute_dtype)
            self.start.load(self.trainer.strategy.root_device, self.student)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.suites[batch.suite].update(self.suite_scores[batch.suite], batch, self)

    def read(
        self, texts: RolloutBatch, *, top_k: int = 0, compare_with_start: bool = False
    ) -> HeadScores:
        """Score the response tokens of `texts` in one forward pass per model.

        The heads of student and start compute in the same precision, so that equal weights give a
        KL of exactly 0. See `evaluation.base.Reader`.
        """
        states = self.student.states(texts, "student")
        comparisons = {}
        if compare_with_start:
            assert self.start is not None
            comparisons["start"] = Comparison(self.start.states(texts, "student"), ForwardKL())
        targets = texts.response_ids[texts.response_mask]
        with torch.autocast(targets.device.type, enabled=False):
            return score(states, targets, top_k=top_k, comparisons=comparisons)

    def test_step(self, *args: Any, **kwargs: Any) -> None:
        self.validation_step(*args, **kwargs)

    def on_validation_epoch_start(self) -> None:
        self._new_suites("validate")

    def on_test_epoch_start(self) -> None:
        self._new_suites("test")

    def on_validation_epoch_end(self) -> None:
        self._log_suites("val")
        self.validation_is_over = not self.trainer.sanity_checking

    def on_test_epoch_end(self) -> None:
        self._log_suites("test")

    def _new_suites(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.suites = data.suites_of(stage)
        self.suite_scores = {
            name: suite.scores(data.loaded[name]).to(self.device)
            for name, suite in self.suites.items()
        }
        self.derived, self.tables = {}, {}

    def _log_suites(self, prefix: str) -> None:
        self.scores = {
            f"{prefix}/{name}/{key}": float(value)
            for name, scores in self.suite_scores.items()
            for key, value in scores.compute().items()
        } | self.derived
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits:  # log at the number of steps made; Lightning's step index is one less
            if not self.trainer.sanity_checking:  # of a few batches
                write_validation(self.trainer, self.scores, self.tables)
        else:
            self.scores_by_domain = {
                name: {
                    domain: {key: float(value) for key, value in figures.items()}
                    for domain, figures in scores.compute_by_domain().items()
                }
                for name, scores in self.suite_scores.items()
            }
        self.log_dict(self.scores, logger=not fits)
        if self.start is not None:
            self.start.release()
        if self.student.sharding is not None and any(s.reads for s in self.suites.values()):
            reshard(self.student)  # it was read, and no backward pass follows
