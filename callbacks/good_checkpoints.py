"""Checkpoints after healthy steps of a run, for step-backs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.checkpoints import step_back
from opd_lightning.checkpoints.staging import remove
from opd_lightning.errors import UserError
from opd_lightning.processes import broadcast
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import run_callbacks


@dataclass(frozen=True, kw_only=True)
class StepBack:
    """Settings of step-backs.

    Args:
        every_n_steps: Consecutive healthy steps, all figures in their bands, between checkpoints.
        slow_down: Factor on the learning rate after each step-back, on top of the schedule.
        at_most: Largest number of step-backs; the next collapse stops the run.
    """

    every_n_steps: int = 20
    slow_down: float = 0.1
    at_most: int = 3

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or self.at_most < 1 or not 0 < self.slow_down <= 1:
            raise UserError(
                f"StepBack: got every_n_steps={self.every_n_steps}, slow_down={self.slow_down}, "
                f"at_most={self.at_most}, expected whole numbers from 1 and a factor in (0, 1]"
            )


class GoodCheckpoints:
    """Keeps two checkpoints, each saved after `every` consecutive healthy steps.

    A step-back restores the older one, because `every` healthy steps followed it; none may have
    followed the newer one. The first checkpoint is the start of the run. The files are in the run's
    checkpoint folder, named `good-step=<step>.ckpt`.

    Args:
        every: Consecutive healthy optimiser steps before a checkpoint.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []  # steps of the checkpoints, older first
        self.healthy_steps = 0  # consecutive healthy steps since the last checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "calm": self.healthy_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # `int` validates them: names of deleted files contain them.
        self.steps, self.healthy_steps = [int(step) for step in state["steps"]], int(state["calm"])

    def check(self, trainer: Trainer) -> None:
        """Raise UserError if the run has no checkpoint folder."""
        if not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise UserError(
                "CollapseWatch: got action 'step_back' in a run without a ModelCheckpoint, whose "
                "folder it saves in; leave trainer.enable_checkpointing on, or choose 'stop'"
            )

    def begin(self, trainer: Trainer) -> None:
        """Save the start of a new run; drop missing checkpoints of a resumed one."""
        self.steps = broadcast(lambda: [s for s in self.steps if _path(trainer, s).exists()])
        # Saving a sharded optimiser without state would first make an empty optimiser step.
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        # A run that is resumed from its start has that checkpoint.
        if trainer.global_step == 0 and not self.steps and not is_sharded:
            self._save(trainer)

    def note(self, trainer: Trainer, *, healthy: bool) -> None:
        """Count a step and save if due. Collective; called after every step."""
        self.healthy_steps = self.healthy_steps + 1 if healthy else 0
        if healthy and (not self.steps or self.healthy_steps >= self.every):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        dropped, self.steps = self.steps[:-1], [*self.steps[-1:], trainer.global_step]
        self.healthy_steps = 0  # before saving: the checkpoint contains the counter
        trainer.save_checkpoint(_path(trainer, self.steps[-1]), weights_only=False)
        _remove(trainer, dropped)

    def step_back(self, trainer: Trainer, module: DistillationModule) -> int:
        """Restore the older checkpoint and return its step.

        Every `RunCallback` is called to restore its state, besides weights and optimiser.
        Prefetched rollouts are discarded.
        """
        step, *later = self.steps
        checkpoint = step_back(trainer, _path(trainer, step))
        for callback in run_callbacks(trainer):
            callback.on_step_back(trainer, module, checkpoint)
        trainer.datamodule.engines.prefetch.discard()  # type: ignore[attr-defined]
        self.steps, self.healthy_steps = [step], 0
        _remove(trainer, later)
        return step


def _path(trainer: Trainer, step: int) -> Path:
    saver = trainer.checkpoint_callback
    assert isinstance(saver, ModelCheckpoint)
    return Path(saver.dirpath or ".", f"good-step={step}{saver.FILE_EXTENSION}")


def _remove(trainer: Trainer, steps: Sequence[int]) -> None:
    for step in steps if trainer.is_global_zero else ():
        with suppress(OSError):  # leftover files only use disk space
            remove(_path(trainer, step))
