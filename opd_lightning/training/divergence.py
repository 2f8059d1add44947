"""Base class of methods whose loss is a divergence from one teacher."""

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
    """Method with loss `L = aggregate of D(S_t, T_t)` on student prefixes, differentiated directly.

    Args:
        student: The model that learns, under the plain prompt.
        teacher: The teacher, with the student's vocabulary size. A teacher outside this process
            (remote, cached) provides top-k log-probs only and needs a `TopK` divergence.
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
