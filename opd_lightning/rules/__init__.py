"""Rules, which transform a token signal; a method consists of a signal and rules."""

from opd_lightning.rules.agreement import AlignedReweighting, MarginShift
from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
from opd_lightning.rules.change_point import ChangePointMask
from opd_lightning.rules.common import kept
from opd_lightning.rules.controls import RandomGate
from opd_lightning.rules.evidence import EvidenceMask, EvidenceMultiplier, EvidenceWeight
from opd_lightning.rules.gates import (
    CorrectnessGate,
    GroupGate,
    OnlyCorrect,
    SignGate,
    TrajectoryGate,
)
from opd_lightning.rules.imitation import EntropyWeight, InDistributionWeight, LikelihoodWeight
from opd_lightning.rules.importance import DriftGate, IcePop, TruncatedImportance
from opd_lightning.rules.masks import (
    HighEntropyMask,
    LikelihoodMask,
    PrefixWindow,
    SkipFirst,
    TeacherEntropyMask,
    TokenImportanceMask,
    TokenMask,
)
from opd_lightning.rules.outcomes import CompetenceWeight, RewardWeight, TeacherRatio
from opd_lightning.rules.regulation import (
    AddOutcome,
    Floor,
    HardClip,
    PhasedFloor,
    PowerReward,
    ReliableExtrapolation,
    SoftLog,
    VocabularyBaseline,
)
from opd_lightning.rules.terms import EntropyBonus, EntropyGatedForwardKL, Term, TrustRegion
from opd_lightning.rules.weights import (
    LateWeight,
    PositionWeight,
    ScopeWeight,
    StabilityWeight,
)

__all__ = [
    "AddOutcome",
    "AlignedReweighting",
    "ChangePointMask",
    "Compare",
    "CompetenceWeight",
    "CorrectnessGate",
    "DriftGate",
    "EntropyBonus",
    "EntropyGatedForwardKL",
    "EntropyWeight",
    "EvidenceMask",
    "EvidenceMultiplier",
    "EvidenceWeight",
    "Floor",
    "GroupGate",
    "HardClip",
    "HighEntropyMask",
    "IcePop",
    "InDistributionWeight",
    "LateWeight",
    "LikelihoodMask",
    "LikelihoodWeight",
    "MarginShift",
    "OnlyCorrect",
    "PhasedFloor",
    "PositionWeight",
    "PowerReward",
    "PrefixWindow",
    "RandomGate",
    "Rates",
    "ReliableExtrapolation",
    "RewardWeight",
    "Rule",
    "ScopeWeight",
    "Scored",
    "SignGate",
    "Signal",
    "SkipFirst",
    "SoftLog",
    "StabilityWeight",
    "TeacherEntropyMask",
    "TeacherRatio",
    "Term",
    "TokenImportanceMask",
    "TokenMask",
    "TrajectoryGate",
    "TruncatedImportance",
    "TrustRegion",
    "VocabularyBaseline",
    "kept",
]
