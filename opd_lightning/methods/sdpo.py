"""SDPO: self-distillation from a prompt with a successful peer or the verifier's feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_lightning.losses.divergence import Divergence
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule
from opd_lightning.rules.importance import TruncatedImportance
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.training.divergence import DivergenceMethod


class SDPO(DivergenceMethod):
    """Self-distillation policy optimisation (2601.20802).

        L = (1/Z) sum_t JSD_alpha(S_t(. | x), T_t(. | x, peer, feedback)) on top-k and a tail

    The teacher's prompt contains the first other response to the prompt with reward >= 0.5 and the
    verifier's feedback, if any. Rollouts with neither have no loss.

    Args:
        student: The model to train, on the plain prompt.
        teacher: `EMATeacher`: rate 0.05, or 0.01 with rich feedback. Never the live model.
        view: A prompt view whose template reads `peer` or `feedback`.
        divergence: The student's top 100 with a tail bucket, alpha 0.5 (generalisation runs; rich
            feedback used the top 20 and alpha 1).
        importance_cap: Cap of the importance weights between trainer and engine.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    needs_groups = True

    def __init__(
        self,
        student: Student,
        teacher: DistributionTeacher,
        view: str = "feedback",
        divergence: Divergence = TopK(  # noqa: B008 - frozen, and shown by --help
            k=100, support="student", normalise="tail", divergence="jsd"
        ),
        importance_cap: float | None = 2.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, view, divergence, **shared)
        self.importance_cap = importance_cap

    def own_rules(self) -> Sequence[Rule]:
        if self.importance_cap is None:
            return []
        return [TruncatedImportance(cap=self.importance_cap)]
