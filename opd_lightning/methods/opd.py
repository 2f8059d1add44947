"""On-policy distillation: reverse KL to a teacher on the student's own samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import return_to_go
from opd_lightning.losses.divergence import Divergence, ReverseKL
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.divergence import DivergenceMethod


class OPD(ComposedMethod):
    """Sampled-token reverse KL as a policy gradient (Thinking Machines Lab, 2025).

        A_t = sum_{k >= t} discount^(k - t) d_k,   d_t = log pi_T(y_t) - log pi_theta(y_t)
        L   = -(1/Z) sum_t sg[A_t] log pi_theta(y_t)

    The student log-probs inside d_t are the trainer's. No clip, no baseline, no whitening, no
    reward: strictly on-policy, one optimiser step per batch of rollouts.

    Args:
        student: The model to train.
        teacher: The model to distil; needs only log-probs of the sampled tokens.
        discount: Weight of the signal on later tokens; the authors saw no gain above 0.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self, student: Student, teacher: Teacher, discount: float = 0.0, **shared: Any
    ) -> None:
        super().__init__(student, **shared)
        if not 0 <= discount <= 1:
            raise UserError(f"discount: got {discount}, expected a number in [0, 1]")
        self.teacher = teacher
        self.discount = discount

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, "student")}

    @property
    def sums_tokens(self) -> bool:
        return self.discount > 0

    def advantage(self, scored: Scored) -> Tensor:
        return return_to_go(scored.log_ratio, scored.batch.response_mask, self.discount)


class DivergenceOPD(DivergenceMethod):
    """Divergence between full distributions at every sampled prefix, differentiated directly.

        L = (1/Z) sum_t D(S_t, T_t)

    With the reverse KL over the whole vocabulary its gradient is the expected gradient of `OPD`,
    without sampling noise; with `TopK` it reads only the top tokens. The dependence of the prefixes
    on the student is ignored, as is usual.

    Args:
        student: The model to train.
        teacher: A teacher with the student's vocabulary size; in this process unless D is a `TopK`.
        divergence: Any divergence of `opd_lightning.losses`.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        divergence: Divergence = ReverseKL(),  # noqa: B008 - frozen, and shown by --help
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, "student", divergence, **shared)
