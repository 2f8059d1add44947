"""SG-OPD: extrapolation where verifier and teacher agree, with early imitation of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opd_lightning.losses.schedule import Schedule
from opd_lightning.methods.g_opd import teacher_and_reference
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule
from opd_lightning.rules.gates import SignGate
from opd_lightning.rules.importance import TruncatedImportance
from opd_lightning.rules.weights import StabilityWeight
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class SGOPD(ComposedMethod):
    """Sign-gated OPD with phased teacher sampling (2606.09304).

        a1  = sign of the outcome advantage of the rollout within its prompt's group
        A_t = d_t + (scale - 1) (log pi_T - log pi_ref)   where a1 d_t > 0 (consensus)
        A_t = beta d_t                                     elsewhere ("interp")
        L   = L_gate + alpha(step) * cross-entropy on the teacher's verified responses

    The paper prints a2 with the opposite sign, which contradicts its figures; they show d_t. Token
    losses are averaged over the step's tokens, as in G-OPD's code that it builds on; the equation's
    (1/|y|) is `aggregation: seq-mean-token-mean`.

    Phased teacher sampling is `data.mix.teacher` 0.125 with `only_correct`, and
    `callbacks.PhasedTeacherSampling`, which changes alpha and ends it. The published best setting
    is scale 1.8, beta 1; alpha and the stability weight's tau were not published.

    Args:
        student: The model to train.
        teacher: The model to distil.
        reference: The student's initial weights, frozen; not read at scale 1.
        scale: Extrapolation on consensus tokens.
        fallback: Advantage of tokens without consensus: `beta d_t` ("interp"), "preserve" (d_t) or
            "grpo" (the outcome advantage).
        beta: Of the fallback "interp" alone; 0 masks conflicts, 1 is OPD on them.
        stability: tau of the weight `min(1, tau / |d_t|)`, unit mean over the step; None for
            none, our default.
        imitation: alpha, unless a callback changes it. Ours: 0.2, the value named in an ablation.
        importance_cap: Cap of the importance weights between trainer and engine.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        reference: Teacher | None = None,
        scale: float = 1.8,
        fallback: Literal["interp", "preserve", "grpo"] = "interp",
        beta: float = 1.0,
        stability: float | None = None,
        imitation: float | Schedule | None = 0.2,
        importance_cap: float | None = 5.0,
        **shared: Any,
    ) -> None:
        super().__init__(student, imitation=imitation, **shared)
        self._asks = teacher_and_reference(teacher, reference, scale)
        self.gate = SignGate(scale=scale, fallback=fallback, beta=beta)
        self.stability = stability
        self.importance_cap = importance_cap

    def asks(self) -> Mapping[str, Ask]:
        return self._asks

    def own_rules(self) -> Sequence[Rule]:
        rules: list[Rule] = [self.gate]
        if self.stability is not None:
            rules.append(StabilityWeight(tau=self.stability))
        if self.importance_cap is not None:
            rules.append(TruncatedImportance(cap=self.importance_cap))
        return rules
