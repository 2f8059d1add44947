"""Measuring a student on suites of prompts: what `opd validate` and `opd test` log."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from opd_lightning.data.evaluation import EvaluationBatch
from opd_lightning.metrics.evaluation import SuiteScores


class EvaluatedModule(LightningModule):
    """Scores every suite that the DataModule streams and logs it by the suite's name."""

    def __init__(self) -> None:
        super().__init__()
        self.suites: dict[str, SuiteScores] = {}
        self.validation_is_over = False  # all of its prompts are scored

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
        for name, scores in self.suites.items():
            self.log_dict({f"{prefix}/{name}/{k}": v for k, v in scores.compute().items()})
