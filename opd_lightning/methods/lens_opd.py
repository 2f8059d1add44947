"""OPD from one teacher under several prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class LensOPD(ComposedMethod):
    """On-policy self-distillation through several views of the prompt, its "lenses".

        A_t = sum_k w_k (log pi_T(y_t | x, r_k) - log pi_theta(y_t | x)),   a policy gradient

    Its expected gradient at a prefix is that of `sum_k w_k KL(pi_theta || pi_T(. | x, r_k))`: with
    weights of sum 1, that of the KL to the normalised geometric mean of the lenses. Each lens is
    one more pass of the teacher. The sum of divergences is an idea of public notes on
    self-distillation, in which every view asks for something else (a valid argument, brevity), and
    not of a paper. A response that lacks one of the views gives no gradient.

    Rules that read the teacher's log-probs, and the logged signal, are about the first lens.

    Args:
        student: The model to train, on the plain prompt.
        teacher: The same model, frozen, or any other.
        lenses: Weight by view, or a schedule of it: a curriculum over what the views ask for.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        lenses: dict[str, float | Schedule],
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        if not lenses:
            raise UserError("lenses: got none, expected the weight of at least one view")
        for view, weight in lenses.items():
            if not 0 <= value_at(weight, 0) < math.inf:
                raise UserError(f"lenses.{view}: got {weight}, expected 0 or more, and finite")
        self.teacher = teacher
        self.lenses = lenses

    def asks(self) -> Mapping[str, Ask]:
        first, *others = self.lenses
        asks = {"teacher": Ask(self.teacher, first)}
        return asks | {f"lens_{view}": Ask(self.teacher, view) for view in others}

    def advantage(self, scored: Scored) -> Tensor:
        step = scored.batch.totals.step
        weights = [value_at(weight, step) for weight in self.lenses.values()]
        ratios = [scored.others[name].logprobs - scored.student.logprobs for name in self.asks()]
        return torch.stack([w * d for w, d in zip(weights, ratios, strict=True)]).sum(dim=0)
