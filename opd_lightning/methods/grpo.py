"""GRPO, the reward-only baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored
from opd_lightning.training.composed import ComposedMethod


class GRPO(ComposedMethod):
    """Group-relative policy optimisation (2402.03300), strictly on-policy, no teacher.

        A = (R - mean) / (std + eps) within the prompt's group, the same for all of its tokens

    Averaged over tokens as in verl; the paper averages each sequence first (`aggregation:
    seq-mean-token-mean`). A group of equal rewards has zero advantages. Add `terms: [TrustRegion]`
    for the KL to a reference.

    Args:
        student: The model to train.
        normalise_std: Divide by the group's standard deviation; False as in Dr. GRPO.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    needs_groups = True

    def __init__(self, student: Student, normalise_std: bool = True, **shared: Any) -> None:
        super().__init__(student, **shared)
        self.normalise_std = normalise_std

    def advantage(self, scored: Scored) -> Tensor:
        return scored.outcome_advantage(normalise=self.normalise_std)
