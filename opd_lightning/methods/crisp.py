"""CRISP: a model told to be concise teaches itself to be so untold."""

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
    student every 50 steps, `EMATeacher(rate=1, every=50)`: frozen compresses less, every step
    collapses, and the forward KL against a moving self lets lengths diverge.

    Args:
        student: The model that learns, from the plain prompt.
        teacher: See above.
        view: The prompt with the instruction.
        divergence: See above.
        aggregation: The authors divide by |y|.
        shared: The arguments of `ComposedMethod` and `DistillationModule`.
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
