"""Checkpoints of a run that an exception or a signal (Ctrl-C, SIGTERM, SIGHUP) ends."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints import save_last
from opd_lightning.errors import CheckpointError, CollapseError, note
from opd_lightning.run import signals
from opd_lightning.run.signals import SignalledError, signal_of
from opd_lightning.training.callback import RunCallback


class SaveOnInterruption(RunCallback):
    """Callback that saves `last.ckpt` when an exception or a signal ends a step.

    After a signal one line reports what was saved: the state at the beginning of the step. Nothing
    is saved before the first optimiser step, nor while the optimiser updates the weights (the
    previous checkpoint is then the newest complete state). Runs of several processes save nothing
    either: a failed process cannot take part in a collective save, and a signal reaches processes
    at different collectives. `callbacks.SlurmRequeue` lets them finish the step.
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
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if isinstance(exception, CheckpointError | CollapseError | SignalledError):
            return  # saving failed, the state is not worth keeping, or it was just saved
        if trainer.checkpoint_callback and self._began and trainer.global_step > 0:
            line = self._save(trainer, pl_module)
        elif not isinstance(exception, KeyboardInterrupt):
            return
        elif trainer.checkpoint_callback:
            line = "no step was finished since the start, so there is nothing to save"
        else:
            line = "nothing saved: the run has no ModelCheckpoint"
        if isinstance(exception, KeyboardInterrupt):
            line = f"{signal_of(exception).name}: {line}"
            exception.is_reported = True  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            note(line)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Save the step's beginning if that is possible, and return a message about it."""
        if pl_module.is_updating or trainer.world_size > 1:
            return "nothing saved: " + (_UPDATING if pl_module.is_updating else _SEVERAL)
        try:
            path = save_last(trainer)
        except Exception as failure:  # the exception that ended the run is the one to report
            return f"could not save the step's beginning: {' '.join(str(failure).split())}"
        return f"saved the beginning of step {trainer.global_step}: --ckpt_path {path}"


class TermAsInterrupt(_SignalConnector):
    """Signal connector that handles SIGTERM and SIGHUP as Ctrl-C, unless others do.

    Replaces Lightning's handlers, which run collectives inside a signal handler: if only one rank
    is signalled, or two are at different collectives, the run hangs.
    """

    def register_signal_handlers(self) -> None:
        self._original_handlers = signals.interrupt_on_stops()


_UPDATING = "the run ended during a weight update; resume from the last checkpoint"
_SEVERAL = (
    "of several processes, one alone cannot; resume from the last checkpoint (on SIGTERM "
    "callbacks.SlurmRequeue has all of them save, also without SLURM)"
)
