"""EDGE-OPD: self-distillation of a privileged context, gated by evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opd_lightning.errors import UserError
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rule
from opd_lightning.rules.evidence import EvidenceMask, EvidenceWeight
from opd_lightning.rules.regulation import HardClip
from opd_lightning.rules.terms import TrustRegion
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.composed import ComposedMethod


class EDGEOPD(ComposedMethod):
    """Evidence-gated self-distillation (2605.23493).

        e_t = log pi_T(y_t | x, r) - log pi_T(y_t | x)          the evidence, one teacher twice
        A_t = 1[e_t > threshold] (log pi_T(y_t | x, r) - log pi_theta(y_t | x))
        L   = -(1/Z) sum_t sg[A_t] log pi_theta(y_t | x) + anchor KL(pi_theta || pi_T)(x)

    Guided rollouts are `data.mix.guided` 0.5; they deliberately get no importance correction. Z
    counts all response tokens (not stated in the paper); aggregation "mask-mean" counts those kept.
    `evidence: soft` keeps every token and weights it by `clip(exp(e_t), 1 -+ epsilon)`, which with
    anchor 0 is RLSD without a verifier; `evidence: none` with anchor 0 is OPSD-K1.

    Args:
        student: The model to train.
        teacher: The same model before training, frozen; scores with and without the text.
        view: Privileged prompt view; `data.mix.guided_view` must be the same.
        evidence: Use of the evidence: "mask", "soft" or "none".
        region: Tokens that the mask keeps.
        threshold: Of the mask, see above; strict, and not of the region "near-zero".
        epsilon: Half-width of the soft weight; not published for these runs, 0.2 as in RLSD.
        anchor: Weight of the KL to the teacher without the text; 0 for none.
        estimator: Estimator of that KL, see `TrustRegion`. Not named in the paper; k3 is the
            default of the framework it builds on. The gradient of k2 has the full log-ratio, which
            is large on guided tokens, and reverts more of the learning.
        clip: Bound of |A_t|: guided responses contain tokens of very low probability under the
            student's prompt. None, as in the paper, for no bound.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        view: str = "privileged",
        evidence: Literal["mask", "soft", "none"] = "mask",
        region: Literal["positive", "negative", "near-zero"] = "positive",
        threshold: float = 0.0,
        epsilon: float = 0.2,
        anchor: float = 0.05,
        estimator: Literal["k2", "k3", "full"] = "k3",
        clip: float | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.teacher = teacher
        self.view = view
        for name, got, default, is_read, reader in (
            ("region", region, "positive", evidence == "mask", "evidence 'mask'"),
            ("threshold", threshold, 0.0, evidence == "mask", "evidence 'mask'"),
            ("epsilon", epsilon, 0.2, evidence == "soft", "evidence 'soft'"),
            ("estimator", estimator, "k3", anchor != 0, "an anchor above 0"),
        ):
            if got != default and not is_read:
                raise UserError(
                    f"{name}: got {got!r} with evidence {evidence!r} and anchor {anchor:g}, "
                    f"expected it with {reader} only; leave it out"
                )
        self.gates: list[Rule] = []
        if evidence == "mask":
            self.gates.append(EvidenceMask(region=region, threshold=threshold))
        elif evidence == "soft":
            self.gates.append(EvidenceWeight(epsilon=epsilon))
        if clip is not None:
            if not clip >= 0:
                raise UserError(f"clip: got {clip}, expected at least 0 (nats)")
            self.gates.append(HardClip(low=-clip, high=clip))
        self.anchors = [TrustRegion(teacher, anchor, estimator, name="anchor")] if anchor else []

    def asks(self) -> Mapping[str, Ask]:
        asks = {"teacher": Ask(self.teacher, self.view)}
        if any("plain" in rule.needs for rule in self.gates):
            asks["plain"] = Ask(self.teacher, "student")
        return asks

    def own_rules(self) -> Sequence[Rule]:
        return self.gates

    def own_terms(self) -> Sequence[TrustRegion]:
        return self.anchors
