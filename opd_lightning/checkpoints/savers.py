"""State of Lightning's ModelCheckpoint that its own checkpoint state does not include."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

_UNSAVED = (
    "current_score",
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
)


class RememberSavers(Callback):
    """Callback that saves and restores further state of every ModelCheckpoint.

    Without it a resumed run would immediately save the step that it resumed from again, as `-v1`,
    and keep it twice among the best.
    """

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["savers"] = {
            saver.state_key: {name: getattr(saver, name) for name in _UNSAVED}
            for saver in _savers(trainer)
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for saver in _savers(trainer):
            for name, value in checkpoint.get("savers", {}).get(saver.state_key, {}).items():
                if name in _UNSAVED:
                    setattr(saver, name, value)
            if saver._every_n_train_steps:  # it was saved before the saver recorded the step
                saver._last_global_step_saved = checkpoint["global_step"]


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
