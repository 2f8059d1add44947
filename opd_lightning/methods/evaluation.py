"""Measuring a student on suites of prompts: what `opd validate` and `opd test` log."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.data.evaluation import EvaluationBatch
from opd_lightning.metrics.evaluation import SuiteScores
from opd_lightning.run_log import write_figures


class EvaluatedModule(LightningModule):
    """Scores every suite that the DataModule streams and logs it by the suite's name."""

    def __init__(self) -> None:
        super().__init__()
        self.suites: dict[str, SuiteScores] = {}
        self.scores: dict[str, float] = {}  # of the last validation or test, as they are logged
        self.validation_is_over = False  # of the weights as they are now

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.suites[batch.suite].update(batch.rollouts, batch.answers)

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

    def _log_suites(self, prefix: str) -> None:
        self.scores = {
            f"{prefix}/{name}/{key}": float(value)
            for name, scores in self.suites.items()
            for key, value in scores.compute().items()
        }
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits:  # at the number of steps made; Lightning's index is one less
            write_figures(self.trainer, self.scores, self.trainer.global_step)
        self.log_dict(self.scores, logger=not fits)
