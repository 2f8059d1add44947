"""TrOPD: on-policy distillation in a trust region that is sampled per token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Scored, Signal
from opd_lightning.rules.common import uniform_draws
from opd_lightning.seeding import TRUST_REGION
from opd_lightning.teachers.base import Teacher
from opd_lightning.training.switched import SwitchedMethod


class TrOPD(SwitchedMethod):
    """Trust-region on-policy distillation (2606.01249).

        inside, with probability min(1, pi_T(y_t) / pi_theta(y_t)):  -d_t log pi_theta(y_t)
        outside:  KL(T || S) on the teacher's top-k

    The draws follow from the seed, the step, the prompt and the response. The paper's second part,
    rollouts that continue a prefix of the teacher, is not implemented.

    Args:
        student: The model to train.
        teacher: Teacher that returns top-k log-probs.
        outside: Divergence outside of the region; k 32 without renormalisation is chosen here.
        seed: Seed of the draws.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        outside: TopK = TopK(  # noqa: B008 - frozen, and shown by --help
            k=32, support="teacher", normalise="none", divergence="forward"
        ),
        seed: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, outside, **shared)
        self.seed = seed

    def pushes(self, signal: Signal, scored: Scored) -> Tensor:
        draws = uniform_draws(scored.batch, self.seed, purpose=TRUST_REGION)
        inside = draws < scored.log_ratio.exp()
        self.rates.update(scored.batch, {"trust/inside": inside})
        return inside
