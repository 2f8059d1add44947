"""G-OPD and ExOPD: on-policy distillation with a scaled implicit reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import extrapolated
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.importance import TruncatedImportance
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class GOPD(ComposedMethod):
    """Generalised OPD (2602.12125): scale the teacher's reward over a reference.

        A_t = d_t + (scale - 1) (log pi_T(y_t) - log pi_ref(y_t))

    The optimum per prefix is proportional to `pi_T^scale pi_ref^(1 - scale)`: 0 is the reference,
    1 is OPD, above 1 (ExOPD) extrapolates beyond the teacher. Large scales degrade: the default is
    the authors' 1.25, and 1.5 was already harmful with a much stronger teacher.

    Args:
        student: The model to train.
        teacher: The model to distil; a `ByDomainTeacher` combines several.
        reference: Frozen model: the student's initial weights (`FrozenTeacher` of its folder, or
            `AdapterOffTeacher` with LoRA), or the model that the teacher was trained from, so that
            the reward is the effect of that training. Not read at scale 1.
        scale: A number, or a schedule of the optimiser step.
        importance_cap: Cap of the importance weights between trainer and engine; 5 as in the
            official code.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        reference: Teacher | None = None,
        scale: float | Schedule = 1.25,
        importance_cap: float | None = 5.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self._asks = teacher_and_reference(teacher, reference, scale)
        self.scale = scale
        self.importance_cap = importance_cap

    def asks(self) -> Mapping[str, Ask]:
        return self._asks

    def advantage(self, scored: Scored) -> Tensor:
        if "reference" not in scored.others:
            return scored.log_ratio
        scale = value_at(self.scale, scored.batch.totals.step)
        reference = scored.others["reference"].logprobs
        return extrapolated(scored.teacher.logprobs, scored.student.logprobs, reference, scale)

    def own_rules(self) -> Sequence[Rule]:
        if self.importance_cap is None:
            return []
        return [TruncatedImportance(cap=self.importance_cap)]


def teacher_and_reference(
    teacher: Teacher, reference: Teacher | None, scale: float | Schedule
) -> dict[str, Ask]:
    """Return the asks of G-OPD and SG-OPD, without the reference, which is unused, at scale 1."""
    asks = {"teacher": Ask(teacher, "student")}
    if scale != 1:
        if reference is None:
            raise UserError(
                f"reference: got nothing for scale {scale}; name the student's start or the "
                "teacher's base, or set scale to 1, which is OPD"
            )
        asks["reference"] = Ask(reference, "student")
    return asks
