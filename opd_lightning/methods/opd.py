"""On-policy distillation: reverse KL to a teacher on the student's own samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lightning.losses.advantage import log_ratio, return_to_go
from opd_lightning.losses.divergence import reverse_kl
from opd_lightning.losses.surrogate import policy_gradient
from opd_lightning.methods.base import DistillationModule
from opd_lightning.student import Student
from opd_lightning.teachers.base import DistributionTeacher, Teacher
from opd_lightning.types import RolloutBatch


class OPD(DistillationModule):
    """Sampled-token reverse KL as a policy gradient (Thinking Machines Lab, 2025).

        A_t = sum_{k >= t} discount^(k - t) d_k,   d_t = log pi_T(y_t) - log pi_theta(y_t)
        L   = -(1/Z) sum_t sg[A_t] log pi_theta(y_t)

    The student log-probs inside d_t are the trainer's. No clip, no baseline, no whitening, no
    reward: strictly on-policy, one optimiser step per batch of rollouts.

    Args:
        student: The model that learns.
        teacher: The model it learns from; needs only log-probs of the sampled tokens.
        discount: Weight of the signal on later tokens; the authors saw no gain above 0.
        shared: The arguments of `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        discount: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.discount = discount

    def teachers(self) -> list[Teacher]:
        return [self.teacher]

    def token_losses(self, batch: RolloutBatch) -> Tensor:
        teacher = self.score_teacher(self.teacher, batch)
        student = self.score_student(batch)
        self.signal.update(batch, student, teacher)
        signal = log_ratio(teacher.logprobs, student.logprobs)
        advantages = return_to_go(signal, batch.response_mask, self.discount)
        return policy_gradient(student.logprobs, advantages)


class FullVocabularyOPD(DistillationModule):
    """Reverse KL over the whole vocabulary at every visited prefix (GKD at beta 1, 2306.13649).

        L = (1/Z) sum_t sum_v S_t(v) (log S_t(v) - log T_t(v))

    The expected gradient of `OPD` without its sampling noise, for teachers in this process. That
    the prefixes themselves depend on the student is ignored, as everywhere in practice.

    Args:
        student: The model that learns.
        teacher: A teacher in this process, with the student's vocabulary size.
        shared: The arguments of `DistillationModule`.
    """

    compares_distributions = True

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher

    def teachers(self) -> list[Teacher]:
        return [self.teacher]

    def token_losses(self, batch: RolloutBatch) -> Tensor:
        with self.timer.stage("teacher"):
            states = self.teacher.states(batch, "student")
        with self.timer.stage("student"):
            student, teacher, divergence = self.student.compare(
                batch, states, reverse_kl, top_k=self.overlap_top_k
            )
        self.compare_with_engine(batch, student)
        self.signal.update(batch, student, teacher)
        return divergence
