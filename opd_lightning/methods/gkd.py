"""GKD: generalised knowledge distillation on sampled and recorded responses."""

from __future__ import annotations

from typing import Any

from opd_lightning.losses.divergence import JSD
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.training.divergence import DivergenceMethod


class GKD(DivergenceMethod):
    """Generalised knowledge distillation (2306.13649), in TRL's convention.

        L = (1/Z) sum_t beta KL(T || M) + (1 - beta) KL(S || M),   M = (1 - beta) S + beta T

    beta 0 is the forward KL and beta 1 the reverse KL. The authors' data mix, lambda 0.5 drawn per
    batch, is `data.mix: {recorded: 0.5, whole_steps: true}`; their temperature is 0.9.

    Args:
        student: The model to train.
        teacher: A teacher in this process, with the student's vocabulary size.
        beta: See above.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self, student: Student, teacher: DistributionTeacher, beta: float = 0.5, **shared: Any
    ) -> None:
        super().__init__(student, teacher, "student", JSD(beta=beta), **shared)
