"""Saving and requeueing of SLURM jobs on signals."""

from __future__ import annotations

import os
import subprocess
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints import save_last
from opd_lightning.errors import UserError, note, report
from opd_lightning.run import signals
from opd_lightning.run.signals import SignalAction, SignalledError
from opd_lightning.training.callback import RunCallback


class SlurmRequeue(RunCallback):
    """Saves `last.ckpt` and exits when any rank receives SIGUSR1, SIGTERM or SIGHUP.

    SIGUSR1 requeues the job, which starts the same script again; with
    `#SBATCH --signal=USR1@SECONDS` SLURM sends it that long before the time limit. SIGTERM
    (`scancel`, preemption) and SIGHUP do not requeue. Signals are handled before a step's rollouts
    are generated, before training on them, and between two batches of a validation. Allow time for
    the longest of these and for saving. An unfinished step is repeated. Before training begins,
    SIGUSR1 is recorded and the others end the run at once.

    The exit code is 0 for a requeued job, 1 if SLURM refuses to requeue it, and 143 after SIGTERM
    (138 after SIGUSR1 outside a job). After the last step of a run signals are ignored.
    """

    handles_signals = True

    def __init__(self) -> None:
        self._began_at = 0  # optimiser steps when this process started

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise UserError(
                "callbacks.SlurmRequeue: got no ModelCheckpoint, so there is no folder to save in; "
                "add lightning.pytorch.callbacks.ModelCheckpoint"
            )
        signals.listen()

    def before_step(self, trainer: Trainer, step: int) -> None:
        self._act_on_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_at = trainer.global_step
        signals.defer()  # before this, there is nothing to save

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._act_on_signals(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        finished = trainer.global_step == trainer.max_steps
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not finished:
            self._act_on_signals(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        signals.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, SignalledError):  # SLURM may send further signals afterwards
            signals.close()

    def _act_on_signals(self, trainer: Trainer) -> None:
        """Save and exit if any rank received a signal. Collective."""
        mine = torch.tensor(signals.requested(), device=trainer.strategy.root_device)
        action = SignalAction(int(trainer.strategy.reduce(mine, reduce_op="max")))
        if action is not SignalAction.NONE:
            saved = self._save(trainer)
            signals.clear()
            _leave(action, saved, trainer.is_global_zero)

    def _save(self, trainer: Trainer) -> str:
        """Save a checkpoint if a step was made; return a message about it."""
        if trainer.global_step == self._began_at:
            return "no step was made since the start, so there is nothing new to save"
        return f"saved the beginning of step {trainer.global_step} as {save_last(trainer)}"


def _leave(action: SignalAction, saved: str, is_first: bool) -> NoReturn:
    """Requeue the job and print a message on rank 0, and end the run on all ranks."""
    job, refusal, code = _job(), None, 128 + action.signal
    line = f"{action.signal.name}: {saved}; "
    if action is SignalAction.REQUEUE and job:
        code = 0
        line += f"job {job} is requeued"
        refusal = _requeue(job) if is_first else None
    else:
        line += "resume with --ckpt_path last"
    if refusal:
        code = 1
        report(f"job {job} could not be requeued ({refusal}); {saved}; submit it again")
    elif is_first:
        note(line)
    raise SignalledError(code)


def _job() -> str | None:
    """Return the SLURM id of this job, or of this task of a job array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _requeue(job: str) -> str | None:
    """Requeue a job; return the reason if SLURM refuses, else None."""
    try:
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        return f"scontrol: {error.strerror}"
    # On success SLURM kills the job's processes, scontrol included: negative code, no output.
    if done.returncode <= 0:
        return None
    return " ".join(done.stderr.split()) or "no reason given"
