"""Checkpoints of a run that an exception, Ctrl-C or SIGTERM ends."""

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
    """Callback that saves `last.ckpt` when an exception or Ctrl-C ends a step.

    The state is that of the step's beginning. Nothing is saved before the first optimiser step, nor
    while the optimiser updates the weights (the previous checkpoint is then the newest complete
    state). Runs of several processes save nothing either: a failed process cannot take part in a
    collective save, and a signal reaches processes at different collectives.
    `callbacks.SlurmRequeue` lets them finish the step.
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
            return  # saving failed, the state is not worth keeping, or it was just saved
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
    """Signal connector that handles SIGTERM as Ctrl-C, unless another handler is installed.

    Replaces Lightning's handlers, which run collectives inside a signal handler: if only one rank
    is signalled, or two are at different collectives, the run hangs.
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
