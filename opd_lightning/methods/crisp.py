"""CRISP: self-distillation from a prompt that asks for conciseness."""

from __future__ import annotations

from typing import Any

from opd_lightning.losses.divergence import Divergence, ReverseKL
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.training.divergence import DivergenceMethod


class CRISP(DivergenceMethod):
    """Concise-prompt self-distillation (2603.05433, also OPSDC).

        L = mean over sequences of (1/|y|) sum_t KL(S_t(. | x) || T_t(. | x, "be concise"))

    Reverse KL over the whole vocabulary; no verifier, no labels. The teacher is a hard copy of the
    student every 50 steps, `EMATeacher(rate=1, every=50)`. A frozen teacher compresses less, an
    update at every step collapses, and with the forward KL and a moving teacher lengths diverge.

    Args:
        student: The model to train, on the plain prompt.
        teacher: See above.
        view: Prompt view with the instruction.
        divergence: See above.
        aggregation: The authors divide by |y|.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        view: str = "concise",
        divergence: Divergence = ReverseKL(),  # noqa: B008 - frozen, and shown by --help
        aggregation: Aggregation = "seq-mean-token-mean",
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, view, divergence, aggregation=aggregation, **shared)
