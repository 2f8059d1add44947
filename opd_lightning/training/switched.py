"""Base class of methods that choose between two losses for every token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.divergence import Divergence
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Compare, Scored, Signal
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.types import TokenScores

ELSEWHERE = "elsewhere"


class SwitchedMethod(ComposedMethod):
    """Method with the policy gradient of d_t on some tokens, and a divergence on the others.

        -A_t log pi_theta(y_t)   where `pushes`,      D(S_t, T_t)   elsewhere

    Args:
        student: The model to train.
        teacher: Teacher that returns the distributions of D.
        divergence: D.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self, student: Student, teacher: Teacher, divergence: Divergence, **shared: Any
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.divergence = divergence

    @abstractmethod
    def pushes(self, signal: Signal, scored: Scored) -> Tensor:
        """Return the tokens `[B, R]` bool whose loss is the policy gradient; log their share."""

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, "student")}

    def comparisons(self) -> Mapping[str, Compare]:
        return {ELSEWHERE: Compare("teacher", self.divergence)}

    def token_loss(
        self, student: TokenScores, signal: Signal, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        pushed = self.policy_gradient(student, signal, scored)
        return torch.where(self.pushes(signal, scored), pushed, values[ELSEWHERE])
