"""SDFT: self-distillation from a prompt with a demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_lightning.losses.divergence import JSD, Divergence
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule
from opd_lightning.rules.masks import SkipFirst
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.training.divergence import DivergenceMethod


class SDFT(DivergenceMethod):
    """Self-distillation fine-tuning (2601.19897) on the student's own rollouts.

        L = mean over sequences of the mean over t > skip of JSD_alpha(S_t(. | x), T_t(. | x, demo))

    Args:
        student: The model to train, on the plain prompt.
        teacher: `EMATeacher` at rate 0.01 in the authors' code.
        view: Prompt view with the demonstration.
        divergence: `JSD(beta=alpha)`. The code's default alpha is 0, the forward KL; the paper
            describes the reverse KL, alpha 1.
        skip: Number of first response tokens without a loss; 3 as in the code.
        aggregation: As in the code.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        view: str = "demonstration",
        divergence: Divergence = JSD(beta=0.0),  # noqa: B008 - frozen, and shown by --help
        skip: int = 3,
        aggregation: Aggregation = "seq-mean-token-mean",
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, view, divergence, aggregation=aggregation, **shared)
        self.skip = skip

    def own_rules(self) -> Sequence[Rule]:
        return [SkipFirst(tokens=self.skip)]
