"""A progress bar that counts what a run is measured in: optimiser steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """One bar for the whole run, with the loss, the reward and tokens per second.

    Args:
        label: What the bar is called.
    """

    def __init__(self, label: str = "step") -> None:
        super().__init__()
        self.label = label

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        bar = self.train_progress_bar
        bar.total = None if math.isinf(steps) else int(steps)
        # A resumed run begins in the middle, and its rate counts from there.
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(self.label)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """A pass over the prompts is no event."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        bar = self.train_progress_bar
        if bar.n != trainer.global_step and not bar.disable:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor is its end."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        rate = shown.pop("tokens_per_second", None)
        return shown if rate is None else {**shown, "tokens/s": f"{rate:.0f}"}
