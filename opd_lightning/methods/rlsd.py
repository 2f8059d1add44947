"""RLSD: advantages with their sign from rewards and their size from a privileged teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from opd_lightning.losses.schedule import Schedule
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.evidence import EvidenceMultiplier
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class RLSD(ComposedMethod):
    """Reinforcement with self-distillation (2604.03128).

        A   = (R - mean) / (std + eps) within the prompt's group
        A_t = A [(1 - mix) + mix clip(exp(sign(A) e_t), 1 - epsilon, 1 + epsilon)]

    Args:
        student: The model to train.
        teacher: The same model, frozen, with the privileged text.
        view: Privileged prompt view.
        baseline: The model pi in e_t = log pi_T(y_t | x, r) - log pi(y_t | x): the "teacher"
            without the text (RLSD according to EDGE-OPD) or the "student" (according to others).
            Equal at the first step of a frozen-start teacher.
        epsilon: Half-width of the multiplier.
        mix: Share of the multiplier; some runs decay it by a schedule.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    needs_groups = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        view: str = "privileged",
        baseline: Literal["teacher", "student"] = "teacher",
        epsilon: float = 0.2,
        mix: float | Schedule = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.view = view
        self.baseline = baseline
        self.multiplier = EvidenceMultiplier(evidence=baseline, epsilon=epsilon, mix=mix)

    def asks(self) -> Mapping[str, Ask]:
        asks = {"teacher": Ask(self.teacher, self.view)}
        if self.baseline == "teacher":
            asks["plain"] = Ask(self.teacher, "student")
        return asks

    def advantage(self, scored: Scored) -> Tensor:
        return scored.outcome_advantage()

    def own_rules(self) -> Sequence[Rule]:
        return [self.multiplier]
