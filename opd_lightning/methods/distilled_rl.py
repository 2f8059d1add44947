"""Distilled RL: GRPO whose positive advantages a teacher spreads over the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.outcomes import TeacherRatio
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class DistilledRL(ComposedMethod):
    """Distilled reinforcement learning (2607.17247).

        A   = (R - mean) / (std + eps) within the prompt's group
        A_t = A r_t / (prod_s r_s)^(1 / T)   where A > 0,   r_t = clip(exp(d_t), low, high)
        A_t = A                              elsewhere

    The clip of the ratio is the paper's; that its mean is taken over a response is known at second
    hand.

    Args:
        student: The model to train.
        teacher: The model to distil; needs only log-probs of the sampled tokens.
        low: Lower bound of the ratio; the authors use 1/3.
        high: Upper bound of the ratio; the authors use 3.
        normalise_std: Divide by the group's standard deviation.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    needs_groups = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        low: float = 1 / 3,
        high: float = 3.0,
        normalise_std: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.normalise_std = normalise_std
        self.spread = TeacherRatio(low, high)

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, "student")}

    def advantage(self, scored: Scored) -> Tensor:
        return scored.outcome_advantage(normalise=self.normalise_std)

    def own_rules(self) -> Sequence[Rule]:
        return [self.spread]
