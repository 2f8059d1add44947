"""Updates of EMA teachers after optimiser steps, and their state in checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from opd_lightning.checkpoints import restoring
from opd_lightning.errors import UserError
from opd_lightning.teachers import EMATeacher
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import RunCallback


class EMATeacherUpdate(RunCallback):
    """Updates every `EMATeacher` of the method after each optimiser step."""

    moves_ema_teachers = True

    def __init__(self) -> None:
        self._moved_at = 0  # optimiser step of the latest update
        self._resumed: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, module: DistillationModule) -> None:  # type: ignore[override]
        self._moved_at = trainer.global_step
        teachers = _ema_teachers(module)
        if self._resumed is None:
            return
        with restoring("the EMA teachers"):
            if [state["rates"] for state in self._resumed] != [_pace(t) for t in teachers]:
                raise UserError(
                    f"resume: the checkpoint holds EMA teachers of (rate, every, warmup) "
                    f"{[state['rates'] for state in self._resumed]}, the run has "
                    f"{[_pace(t) for t in teachers]}; make them alike"
                )
            for teacher, state in zip(teachers, self._resumed, strict=True):
                teacher.load_state_dict(state["parameters"])
        self._resumed = None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule, *_: Any
    ) -> None:
        if trainer.global_step > self._moved_at:  # not after every micro-batch
            self._moved_at = trainer.global_step
            for teacher in _ema_teachers(module):
                teacher.follow(module.student, trainer.global_step)

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._resumed is not None:  # a finished run that repeats its last validation
            checkpoint["ema_teachers"] = self._resumed
            return
        checkpoint["ema_teachers"] = [
            {"rates": _pace(t), "parameters": t.state_dict(module.student)}
            for t in _ema_teachers(module)
        ]

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("ema_teachers", [])

    def on_step_back(
        self, trainer: Trainer, module: DistillationModule, checkpoint: dict[str, Any]
    ) -> None:
        self.on_load_checkpoint(trainer, module, checkpoint)
        self.on_train_start(trainer, module)


def _ema_teachers(module: DistillationModule) -> list[EMATeacher]:
    return [part for part in module.teacher_parts() if isinstance(part, EMATeacher)]


def _pace(teacher: EMATeacher) -> list[float]:
    return [teacher.rate, teacher.every, teacher.warmup]
