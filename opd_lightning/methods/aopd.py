"""AOPD: a policy gradient on tokens that the teacher prefers, a divergence elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lightning.losses.divergence import Divergence
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored, Signal
from opd_lightning.teachers.base import Teacher
from opd_lightning.training.switched import SwitchedMethod


class AOPD(SwitchedMethod):
    """Asymmetric on-policy distillation (2605.06387; from secondary sources).

        A_t > 0:   -A_t log pi_theta(y_t)      A_t <= 0:   D(S_t, T_t)

    A_t is d_t after all rules. For a token that the teacher does not prefer, the divergence also
    raises the tokens that it prefers.

    Args:
        student: The model to train.
        teacher: Teacher that returns the distributions of the divergence.
        divergence: D. The authors take the teacher's top-k; k 32 and the reverse KL are chosen
            here.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        divergence: Divergence = TopK(  # noqa: B008 - frozen, and shown by --help
            k=32, support="teacher", normalise="none", gradient="corrected"
        ),
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, divergence, **shared)

    def pushes(self, signal: Signal, scored: Scored) -> Tensor:
        return signal.advantage > 0
