"""The constants and views of methods, rules and terms are those of the papers they name."""

from __future__ import annotations

from typing import Any

import pytest

from opd_lightning.losses.divergence import (
    JSD,
    AdaptiveKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from opd_lightning.losses.schedule import Staircase
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import (
    CRISP,
    EDGEOPD,
    GKD,
    GOPD,
    OPSD,
    OPSDK1,
    RLSD,
    SDFT,
    SDPO,
    SGOPD,
    DistilledRL,
    DistiLLM2,
    EntropySwitch,
    LightningOPD,
    TrOPD,
)
from opd_lightning.models.student import Student
from opd_lightning.rules import (
    AlignedReweighting,
    CompetenceWeight,
    DriftGate,
    EntropyGatedForwardKL,
    EvidenceMask,
    EvidenceMultiplier,
    EvidenceWeight,
    HardClip,
    HighEntropyMask,
    IcePop,
    LateWeight,
    LikelihoodWeight,
    MarginShift,
    PhasedFloor,
    PositionWeight,
    PowerReward,
    ReliableExtrapolation,
    ScopeWeight,
    SignGate,
    SkipFirst,
    StabilityWeight,
    TeacherRatio,
    TokenImportanceMask,
    TrajectoryGate,
    TruncatedImportance,
    TrustRegion,
)
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.teachers.base import Ask
from opd_lightning.training.composed import ComposedMethod

STUDENT, TEACHER, START = Student("student"), FrozenTeacher("teacher"), FrozenTeacher("start")


@pytest.mark.parametrize(
    ("made", "published"),
    [
        (JSD(), JSD(beta=0.5, clip=None)),  # GKD
        (SkewedForwardKL(), SkewedForwardKL(alpha=0.1)),  # DistiLLM
        (SkewedReverseKL(), SkewedReverseKL(alpha=0.1)),
        (AdaptiveKL(), AdaptiveKL(head=0.5)),
        (AlignedReweighting(), AlignedReweighting(sharpness=1e-3)),
        (MarginShift(), MarginShift(margin=0.4, statistic="mean", moves="both")),
        (CompetenceWeight(), CompetenceWeight(alpha=1.0, beta=1.0)),
        (DriftGate(1.0), DriftGate(1.0, block=64)),
        (EvidenceMask(), EvidenceMask("positive", threshold=0.0)),  # EDGE-OPD
        (EvidenceMask("near-zero"), EvidenceMask("near-zero", width=0.1)),
        (EvidenceWeight(), EvidenceWeight(epsilon=0.2)),
        (EvidenceMultiplier(), EvidenceMultiplier(epsilon=0.2, mix=1.0, evidence="teacher")),
        (HardClip(), HardClip(low=-5.0, high=5.0)),  # MOPD
        (HighEntropyMask(), HighEntropyMask(share=0.2)),
        (TokenImportanceMask(), TokenImportanceMask(share=0.5)),  # TIP
        (IcePop(), IcePop(low=0.5, high=5.0)),
        (LateWeight(), LateWeight(least=0.25, centre=0.3, width=0.1)),  # PW-OPSD
        (LikelihoodWeight(), LikelihoodWeight("p", power=1.0)),  # DFT
        (PhasedFloor(switch_step=1), PhasedFloor(switch_step=1, mixing=0.3, top=0.2)),  # REOPOLD
        (PositionWeight(), PositionWeight(gamma=0.5)),  # IW-OPD
        (PowerReward(), PowerReward(alpha=5.0)),
        (ReliableExtrapolation(1.0), ReliableExtrapolation(1.0, tau=0.007)),  # REOPD
        (ScopeWeight(), ScopeWeight(temperature=1.0)),
        (Staircase(4096.0), Staircase(4096.0, start=1024.0, increment=1024.0)),  # 2607.29494
        (SignGate(), SignGate(scale=1.8, fallback="interp", beta=1.0)),  # SG-OPD
        (SkipFirst(), SkipFirst(tokens=3)),  # SDFT
        (TeacherRatio(), TeacherRatio(low=1 / 3, high=3.0)),  # Distilled RL
        (TrajectoryGate(), TrajectoryGate(margin=0.0)),  # RG-OPD
        (TruncatedImportance(), TruncatedImportance("token", cap=5.0, unit_mean=False)),
    ],
    ids=repr,
)
def test_defaults_are_the_published_values(made: Any, published: Any) -> None:
    assert made == published


def test_terms_have_the_published_constants() -> None:
    gated = EntropyGatedForwardKL()
    assert gated.threshold == 0.8
    assert gated.divergence == TopK(16, "teacher", "teacher", divergence="forward")
    anchor = TrustRegion(START)  # EDGE-OPD's weight; the estimator is ours
    assert (anchor.coefficient, anchor.estimator, anchor.direction) == (0.05, "k2", "reverse")


def own(view: str, **others: Ask) -> dict[str, Ask]:
    """The asks of a method with one teacher under this view."""
    return {"teacher": Ask(TEACHER, view), **others}


PLAIN = {"plain": Ask(TEACHER, "student")}
REFERENCE = {"reference": Ask(START, "student")}
CAP = TruncatedImportance(cap=5.0)


@pytest.mark.parametrize(
    ("method", "asks", "rules"),
    [
        (GOPD(STUDENT, TEACHER, START), own("student", **REFERENCE), [CAP]),
        (
            SGOPD(STUDENT, TEACHER, START),
            own("student", **REFERENCE),
            [SignGate(scale=1.8, fallback="interp", beta=1.0), CAP],
        ),
        (
            SGOPD(STUDENT, TEACHER, scale=1.0, beta=0.7, stability=2.0, importance_cap=None),
            own("student"),
            [SignGate(scale=1.0, fallback="interp", beta=0.7), StabilityWeight(tau=2.0)],
        ),
        (
            SGOPD(STUDENT, TEACHER, START, fallback="grpo", importance_cap=3.0),
            own("student", **REFERENCE),
            [SignGate(scale=1.8, fallback="grpo"), TruncatedImportance(cap=3.0)],
        ),
        (EDGEOPD(STUDENT, TEACHER), own("privileged", **PLAIN), [EvidenceMask("positive")]),
        (
            EDGEOPD(STUDENT, TEACHER, evidence="soft", clip=4.0),
            own("privileged", **PLAIN),
            [EvidenceWeight(epsilon=0.2), HardClip(low=-4.0, high=4.0)],
        ),
        (
            RLSD(STUDENT, TEACHER),
            own("privileged", **PLAIN),
            [EvidenceMultiplier(epsilon=0.2, mix=1.0, evidence="teacher")],
        ),
        (
            RLSD(STUDENT, TEACHER, baseline="student", epsilon=0.1, mix=0.5),
            own("privileged"),
            [EvidenceMultiplier(epsilon=0.1, mix=0.5, evidence="student")],
        ),
        (DistilledRL(STUDENT, TEACHER), own("student"), [TeacherRatio(low=1 / 3, high=3.0)]),
        (
            DistilledRL(STUDENT, TEACHER, low=0.5, high=2.0),
            own("student"),
            [TeacherRatio(low=0.5, high=2.0)],
        ),
        (SDFT(STUDENT, TEACHER), own("demonstration"), [SkipFirst(tokens=3)]),
        (SDPO(STUDENT, TEACHER), own("feedback"), [TruncatedImportance(cap=2.0)]),
        (CRISP(STUDENT, TEACHER), own("concise"), []),
        (OPSD(STUDENT, TEACHER), own("privileged"), []),
        (OPSDK1(STUDENT, TEACHER), own("privileged"), []),
        (LightningOPD(STUDENT, TEACHER), own("student"), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ComposedMethod) else "",
)
def test_methods_read_these_views_and_have_these_rules(
    method: ComposedMethod, asks: dict[str, Ask], rules: list[Any]
) -> None:
    assert method.asks() == asks
    assert method.rules == rules


def test_divergences_and_weights_of_methods() -> None:
    expected: dict[Any, Any] = {
        GKD: JSD(beta=0.5),
        OPSD: JSD(beta=0.5),
        SDFT: JSD(beta=0.0),  # of the code; the paper describes beta 1
        CRISP: ReverseKL(),
        SDPO: TopK(100, "student", "tail", divergence="jsd", beta=None),
        EntropySwitch: TopK(16, "teacher", "teacher", divergence="forward"),
        TrOPD: TopK(32, "teacher", "none", divergence="forward"),
    }
    for kind, divergence in expected.items():
        assert kind(STUDENT, TEACHER).divergence == divergence, kind
    assert EntropySwitch(STUDENT, TEACHER).threshold == 0.8
    distillm = DistiLLM2(STUDENT, TEACHER)
    assert (distillm.given, distillm.own) == (SkewedForwardKL(0.1), SkewedReverseKL(0.1))
    assert GOPD(STUDENT, TEACHER, START).scale == 1.25
    assert SGOPD(STUDENT, TEACHER, START).imitation == 0.2
    (anchor,) = EDGEOPD(STUDENT, TEACHER).terms
    assert isinstance(anchor, TrustRegion)
    assert anchor.asks() == {"anchor": Ask(TEACHER, "student")}
    assert (anchor.coefficient, anchor.estimator) == (0.05, "k3")
    assert EDGEOPD(STUDENT, TEACHER, anchor=0).terms == []
