"""A run that ends early leaves a checkpoint to go on from."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints import save_last
from opd_lightning.errors import CheckpointError, note


class SaveOnInterruption(Callback):
    """Saves the beginning of the step that an exception or Ctrl-C ended, beside the others.

    As `last.ckpt`. Nothing is saved before the first optimiser step, while
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
        if trainer.state.fn != TrainerFn.FITTING or not trainer.checkpoint_callback:
            return
        if not self._began or trainer.global_step == 0 or isinstance(exception, CheckpointError):
            return
        if pl_module.moving or trainer.world_size > 1:
            if trainer.is_global_zero:
                note("nothing saved: " + (_MOVING if pl_module.moving else _SEVERAL))
            return
        try:
            path = save_last(trainer)
        except Exception as failure:  # the exception that ended the run is the one to report
            note(f"could not save the step's beginning: {' '.join(str(failure).split())}")
        else:
            note(f"saved the beginning of step {trainer.global_step}: --ckpt_path {path}")


_MOVING = "the run ended while its weights moved; go on from the last checkpoint"
_SEVERAL = "of several processes, one alone cannot; go on from the last checkpoint"
