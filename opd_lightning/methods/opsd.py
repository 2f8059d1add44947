"""OPSD: on-policy self-distillation from a prompt with privileged text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_lightning.losses.divergence import JSD, Divergence
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import Ask, DistributionTeacher, Teacher
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.divergence import DivergenceMethod


class OPSD(DivergenceMethod):
    """On-policy self-distillation as published (2601.18734): a divergence over the vocabulary.

        L = (1/Z) sum_t JSD_0.5(S_t(. | x), T_t(. | x, r))

    The authors sample at temperature 1.1 (which divides both models' logits), train LoRA of rank 64
    at 2e-4 with 32 responses per step, and keep the teacher at the initial weights. They also
    sample with top-p 0.95 and top-k 20.

    Args:
        student: The model to train, on the plain prompt.
        teacher: The same model: frozen start, `AdapterOffTeacher`, or `EMATeacher`.
        view: Privileged prompt view, such as one that contains the solution.
        divergence: The authors' other option is `TopK(k=50)` on the teacher's support,
            renormalised.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        view: str = "privileged",
        divergence: Divergence = JSD(beta=0.5),  # noqa: B008 - frozen, and shown by --help
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, view, divergence, **shared)


class OPSDK1(ComposedMethod):
    """OPSD on sampled tokens, as in EDGE-OPD (2605.23493) and Many Faces (2605.11182).

        A_t = log pi_T(y_t | x, r) - log pi_theta(y_t | x),   a policy gradient

    Args:
        student: The model to train, on the plain prompt.
        teacher: The same model, frozen.
        view: Privileged prompt view.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self, student: Student, teacher: Teacher, view: str = "privileged", **shared: Any
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.view = view

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, self.view)}
