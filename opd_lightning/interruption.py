"""A run that ends early leaves a checkpoint to go on from."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class SaveOnInterruption(Callback):
    """Saves the beginning of the step that an exception or Ctrl-C ended, beside the others.

    As `last.ckpt` where the run keeps one. Nothing is saved before the first optimiser step, while
    the optimiser moves (the last checkpoint stays the newest whole state), and in runs of several
    processes: one that fails cannot save together with those that go on.
    """

    def __init__(self) -> None:
        self._began = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        checkpoints = trainer.checkpoint_callback
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(checkpoints, ModelCheckpoint):
            return
        if not self._began or trainer.global_step == 0:
            return
        if pl_module.moving or trainer.world_size > 1:
            if trainer.is_global_zero:
                _say("nothing saved: " + (_MOVING if pl_module.moving else _SEVERAL))
            return
        name = checkpoints.CHECKPOINT_NAME_LAST if checkpoints.save_last else "interrupted"
        path = Path(checkpoints.dirpath or ".", name + checkpoints.FILE_EXTENSION)
        if checkpoints.save_last:
            checkpoints.last_model_path = str(path)  # or the resumed run would begin a last-v1
        if path.is_symlink():
            path.unlink()  # not to write into the checkpoint that it names
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except Exception as failure:  # the exception that ended the run is the one to report
            _say(f"could not save the step's beginning: {' '.join(str(failure).split())}")
        else:
            _say(f"saved the beginning of step {trainer.global_step}: --ckpt_path {path}")


_MOVING = "the run ended while its weights moved; go on from the last checkpoint"
_SEVERAL = "of several processes, one alone cannot; go on from the last checkpoint"


def _say(message: str) -> None:
    print(f"opd: {message}", file=sys.stderr)
