"""A run that ends early leaves a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints import save_last
from opd_lightning.errors import CheckpointError, CollapseError, note
from opd_lightning.run.signals import SignalledError
from opd_lightning.training.callback import RunCallback


class SaveOnInterruption(RunCallback):
    """Saves the beginning of the step that an exception or Ctrl-C ended, beside the others.

    As `last.ckpt`. Nothing is saved before the first optimiser step, while the optimiser moves (the
    last checkpoint stays the newest whole state), and in runs of several processes: one that fails
    cannot save together with those that go on, and a signal finds them at different collectives.
    `callbacks.SlurmRequeue` lets them finish the step instead.
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
        if not self._began or trainer.global_step == 0:
            return
        if isinstance(exception, CheckpointError | CollapseError | SignalledError):
            return  # it failed just now, is not worth it, was done just now
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


class TermAsInterrupt(_SignalConnector):
    """SIGTERM does to a run what Ctrl-C does, unless somebody listens to it.

    In place of Lightning's handlers, which talk to the other ranks from inside of a handler: if one
    rank alone is signalled, or two stand at different collectives, the run hangs.
    """

    def register_signal_handlers(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._original_handlers = {signal.SIGTERM: signal.SIG_DFL}
            signal.signal(signal.SIGTERM, signal.default_int_handler)


_MOVING = "the run ended while its weights moved; go on from the last checkpoint"
_SEVERAL = (
    "of several processes, one alone cannot; go on from the last checkpoint (on SIGTERM "
    "callbacks.SlurmRequeue has all of them save, also without SLURM)"
)
