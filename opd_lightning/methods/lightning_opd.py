"""Lightning-OPD: on-policy distillation on responses that were written and scored in advance."""

from __future__ import annotations

from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.methods.opd import OPD
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import Teacher


class LightningOPD(OPD):
    """OPD without a sampler or a teacher at hand (2604.13010).

        A_t = log pi_T(y_t) - log pi_theta(y_t),    y written by the student's start
        L   = -mean over responses of (1/|y|) sum_t sg[A_t] log pi_theta(y_t)

    The teacher's half is read from a `CachedTeacher`, the student's is of the weights as they are,
    and no importance weight corrects for the stale sampler. The authors ask for the teacher that
    wrote what the student was fine-tuned on. Version 2.0's style bias (2607.28449) is not here.

    The responses are those of the prompt file, `data.mix.recorded: 1`: `opd write-responses` writes
    them and `opd cache-teacher` has them scored. Both sides are taken at temperature 1.

    Args:
        student: The model that learns.
        teacher: Usually a `CachedTeacher`; another one is asked in every step.
        discount: Of `OPD`.
        aggregation: Of `DistillationModule`; each response counts alike.
        shared: The arguments of `ComposedMethod` and `DistillationModule`.
    """

    needs_demonstrations = True
    takes_demonstrations = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        discount: float = 0.0,
        aggregation: Aggregation = "seq-mean-token-mean",
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, discount, aggregation=aggregation, **shared)
        if self.imitation is not None:
            raise UserError(
                f"imitation: got {self.imitation}, which would take all of LightningOPD's "
                "responses out of its own loss; leave it out"
            )
