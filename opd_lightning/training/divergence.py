"""A divergence from one teacher as the loss: what several families differ in by defaults only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_lightning.losses.divergence import Divergence
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Compare
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.scoring import LOSS


class DivergenceMethod(ComposedMethod):
    """`L = aggregate of D(S_t, T_t)`, differentiated directly, on the student's visited prefixes.

    Args:
        student: The model that learns, from its own prompt.
        teacher: Whom the student is compared with; has the student's vocabulary size. One that is
            not in this process (remote, cached) knows a few tokens only: `TopK` alone reads those.
        view: The prompt that the teacher reads.
        divergence: D.
        shared: The arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        view: str,
        divergence: Divergence,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.view = view
        self.divergence = divergence

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, self.view)}

    def comparisons(self) -> Mapping[str, Compare]:
        return {LOSS: Compare("teacher", self.divergence)}
