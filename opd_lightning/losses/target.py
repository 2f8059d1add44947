"""Divergences to a target between the two models instead of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import Divergence, kl
from opd_lightning.losses.schedule import Schedule, value_at


@dataclass(frozen=True)
class GeometricTarget(Divergence):
    """KL to a target that is a product of powers of both models, in proportion to `T^a S^b`.

        Veto (2601.07155)                   a 1, b falls linearly to 0; either direction
        TAID (2501.16937; official code)    a rises linearly to 1, b = 1 - a; forward

    The target has no gradient. Where a + b is 1 it lies between the models, and is the teacher
    where they agree. At a 1 and b above 0 it is sharper than the teacher: the optimum is in
    proportion to `T^(1 / (1 - b))`. TAID's official code also moves `a` by the progress of the
    loss, which is not implemented. From secondary sources: Veto.

    Args:
        teacher: a, above 0, or a schedule of it.
        student: b, 0 or more, or a schedule of it; None is 1 - a.
        direction: "forward" is KL(target || S), "reverse" KL(S || target).
    """

    teacher: float | Schedule = 1.0
    student: float | Schedule | None = None
    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, Schedule) and not 0 < self.teacher < float("inf"):
            raise UserError(
                f"GeometricTarget: teacher is {self.teacher}, expected a finite number above 0"
            )
        ours = self.student
        if ours is None and not isinstance(self.teacher, Schedule):
            ours = 1 - self.teacher
        if isinstance(ours, float | int) and not 0 <= ours < float("inf"):
            raise UserError(
                f"GeometricTarget: student is {ours}, expected a finite number of 0 or more"
            )

    def at(self, step: int) -> GeometricTarget:
        theirs = value_at(self.teacher, step)
        ours = 1 - theirs if self.student is None else value_at(self.student, step)
        return replace(self, teacher=theirs, student=ours)

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        assert not isinstance(self.teacher, Schedule), "of one step: see `at`"
        ours = 1 - self.teacher if self.student is None else self.student
        assert not isinstance(ours, Schedule), "of one step: see `at`"
        target = self.teacher * teacher_logprobs
        if ours:  # 0 * -inf is NaN
            target = target + ours * student_logprobs.detach()
        target = torch.log_softmax(target, dim=-1)
        if self.direction == "forward":
            return kl(target, student_logprobs)
        return kl(student_logprobs, target)
