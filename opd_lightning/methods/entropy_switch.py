"""Switch between two losses by the teacher's entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import Divergence
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored, Signal
from opd_lightning.teachers.base import Teacher
from opd_lightning.training.switched import SwitchedMethod


class EntropySwitch(SwitchedMethod):
    """OPD where the teacher is sure, a divergence where it is not: EOPD read as a switch.

        H(pi_T) <= threshold:   -A_t log pi_theta(y_t)      above:   D(S_t, T_t)

    EOPD (2603.07079) itself adds the divergence to the first loss: `OPD` with the term
    `EntropyGatedForwardKL`, whose defaults this method has.

    Args:
        student: The model to train.
        teacher: Teacher that returns its entropy and the distributions of D.
        threshold: Threshold of the teacher's full entropy, nats.
        divergence: D.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    reads_entropy = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        threshold: float = 0.8,
        divergence: Divergence = TopK(  # noqa: B008 - frozen, and shown by --help
            k=16, support="teacher", normalise="teacher", divergence="forward"
        ),
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, divergence, **shared)
        if not threshold >= 0:
            raise UserError(f"threshold: got {threshold}, expected an entropy of 0 or more, nats")
        self.threshold = threshold

    def pushes(self, signal: Signal, scored: Scored) -> Tensor:
        unsure = scored.teacher.entropy > self.threshold
        self.rates.update(scored.batch, {"switch/unsure": unsure})
        return ~unsure
