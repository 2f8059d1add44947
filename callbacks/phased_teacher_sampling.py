"""SG-OPD's phased teacher sampling: teacher responses early in a run, none later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer

from opd_lightning.data.mix import RolloutMix
from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import ThreePhaseCosine
from opd_lightning.training.callback import RunCallback
from opd_lightning.training.composed import ComposedMethod


class PhasedTeacherSampling(RunCallback):
    """Schedules the weight and the sampling of the teacher's responses (2606.09304).

    The weight alpha (`model.init_args.imitation`) is `start` up to `phase1_end`, falls along a
    cosine to `end` at `phase2_end` and is 0 after it; from there on `data.mix.teacher`, the share
    of prompts that the teacher answers, is 0 too. Both are functions of the optimiser step only, so
    a resumed run continues the schedule if `trainer.max_steps` is the same.

    Args:
        start: alpha in phase 1. Not published; chosen after an ablation labelled 0.2.
        end: alpha at the end of phase 2. Not published; chosen here.
        phase1_end: End of phase 1 as a share of `trainer.max_steps`; the published best.
        phase2_end: End of phase 2 as a share of `trainer.max_steps`; the published best.
    """

    def __init__(
        self,
        start: float = 0.2,
        end: float = 0.0,
        phase1_end: float = 0.30,
        phase2_end: float = 0.35,
    ) -> None:
        if not 0 <= phase1_end < phase2_end <= 1:
            raise UserError(
                f"PhasedTeacherSampling: got phase1_end {phase1_end} and phase2_end {phase2_end}, "
                "expected shares of the run with 0 <= phase1_end < phase2_end <= 1"
            )
        self.start = start
        self.end = end
        self.phase1_end = phase1_end
        self.phase2_end = phase2_end
        self._alpha: ThreePhaseCosine | None = None  # set in `setup`

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.max_steps < 1 or not data.mix.samples:
            raise UserError(
                f"PhasedTeacherSampling: got trainer.max_steps {trainer.max_steps} and mix.teacher "
                f"{data.mix.teacher}, expected a number of steps whose shares are the phases, and "
                "prompts left for the student"
            )
        if not isinstance(module, ComposedMethod) or module.imitation is None:
            raise UserError(
                f"PhasedTeacherSampling: {type(module).__name__} does not imitate; use a method "
                "with `imitation` set, such as SGOPD"
            )
        if not data.mix.teacher:
            raise UserError(
                "PhasedTeacherSampling: data.mix.teacher is 0, so the teacher writes nothing; set "
                "it (the paper: 0.125) or take the callback away"
            )
        steps = trainer.max_steps
        self._alpha = module.imitation = ThreePhaseCosine(
            start=self.start,
            end=self.end,
            phase1_end=round(self.phase1_end * steps),
            phase2_end=round(self.phase2_end * steps),
        )

    def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
        if self._alpha is None or self._alpha(step) > 0:
            return mix
        return replace(mix, teacher=0.0, only_correct=False)
