"""DistiLLM-2: another divergence on the teacher's responses than on the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.divergence import SkewedForwardKL, SkewedReverseKL
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Compare, Scored, Signal
from opd_lightning.teachers.base import Ask, DistributionTeacher
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.types import TokenScores

GIVEN, OWN = "given", "own"


class DistiLLM2(ComposedMethod):
    """DistiLLM-2 (2503.07067; official code), on responses of two authors.

        of others:      KL(T || alpha T + (1 - alpha) S)
        the student's:  KL(S || alpha S + (1 - alpha) T)

    Others are the teacher's engine or the prompt file: `data.mix`. The authors pair a response of
    each with every prompt, generated before an epoch; here a prompt has one author or, with
    `add_recorded`, both, and the student's responses are new. In their code the student inside the
    second mixture has no gradient, and alpha may adapt to the responses; here neither.

    Args:
        student: The model to train.
        teacher: A teacher in this process, with the student's vocabulary size.
        alpha: Weight of the first distribution in its mixture, from 0 to below 1.
        aggregation: See `DistillationModule`; the authors average each response over its tokens.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    has_advantage = False
    loss_averages_samples = False  # whole distributions are compared, whoever wrote the response

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        alpha: float = 0.1,
        aggregation: Aggregation = "seq-mean-token-mean",
        **shared: Any,
    ) -> None:
        super().__init__(student, aggregation=aggregation, **shared)
        self.teacher = teacher
        self.given, self.own = SkewedForwardKL(alpha), SkewedReverseKL(alpha)

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(self.teacher, "student")}

    def comparisons(self) -> Mapping[str, Compare]:
        return {GIVEN: Compare("teacher", self.given), OWN: Compare("teacher", self.own)}

    def token_loss(
        self, student: TokenScores, signal: Signal, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        return torch.where(scored.batch.demonstrated[:, None], values[GIVEN], values[OWN])
