"""Rules, which transform a token signal; a method consists of a signal and rules."""

from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
from opd_lightning.rules.common import kept
from opd_lightning.rules.evidence import EvidenceMask, EvidenceMultiplier, EvidenceWeight
from opd_lightning.rules.gates import CorrectnessGate, GroupGate, SignGate, TrajectoryGate
from opd_lightning.rules.importance import IcePop, TruncatedImportance
from opd_lightning.rules.masks import PrefixWindow, SkipFirst, TokenMask
from opd_lightning.rules.regulation import (
    Floor,
    HardClip,
    PhasedFloor,
    SoftLog,
    VocabularyBaseline,
)
from opd_lightning.rules.terms import EntropyBonus, EntropyGatedForwardKL, Term, TrustRegion
from opd_lightning.rules.weights import PositionWeight, ScopeWeight, StabilityWeight

__all__ = [
    "Compare",
    "CorrectnessGate",
    "EntropyBonus",
    "EntropyGatedForwardKL",
    "EvidenceMask",
    "EvidenceMultiplier",
    "EvidenceWeight",
    "Floor",
    "GroupGate",
    "HardClip",
    "IcePop",
    "PhasedFloor",
    "PositionWeight",
    "PrefixWindow",
    "Rates",
    "Rule",
    "ScopeWeight",
    "Scored",
    "SignGate",
    "Signal",
    "SkipFirst",
    "SoftLog",
    "StabilityWeight",
    "Term",
    "TokenMask",
    "TrajectoryGate",
    "TruncatedImportance",
    "TrustRegion",
    "VocabularyBaseline",
    "kept",
]
