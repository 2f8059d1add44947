"""What Lightning's ModelCheckpoint forgets when a run goes on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

_FORGOTTEN = (
    "current_score",
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
)


class RememberSavers(Callback):
    """Lets every ModelCheckpoint go on with what it knew.

    Else a resumed run would at once save the step that it came from a second time, as `-v1`, and
    keep it among the best twice.
    """

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["savers"] = {
            saver.state_key: {name: getattr(saver, name) for name in _FORGOTTEN}
            for saver in _savers(trainer)
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for saver in _savers(trainer):
            for name, value in checkpoint.get("savers", {}).get(saver.state_key, {}).items():
                if name in _FORGOTTEN:
                    setattr(saver, name, value)
            if saver._every_n_train_steps:  # the checkpoint was written before it was noted
                saver._last_global_step_saved = checkpoint["global_step"]


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
