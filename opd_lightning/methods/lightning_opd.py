"""Lightning-OPD: distillation on responses that were generated and scored in advance."""

from __future__ import annotations

from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.methods.opd import OPD
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import Teacher


class LightningOPD(OPD):
    """OPD without a sampler or a teacher during training (2604.13010).

        A_t = log pi_T(y_t) - log pi_theta(y_t),    y written by the student's start
        L   = -mean over responses of (1/|y|) sum_t sg[A_t] log pi_theta(y_t)

    log pi_T is read from a `CachedTeacher`, log pi_theta is that of the current weights, and no
    importance weight corrects for the stale sampler. The authors require the teacher that generated
    the student's fine-tuning data. Version 2.0's style bias (2607.28449) is not implemented.

    The responses are those of the prompt file, `data.mix.recorded: 1`: `opd write-responses`
    generates them and `opd cache-teacher` scores them. Both models have temperature 1.

    Args:
        student: The model to train.
        teacher: Usually a `CachedTeacher`; any other one scores in every step.
        discount: See `OPD`.
        aggregation: See `DistillationModule`; each response has the same weight.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
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
