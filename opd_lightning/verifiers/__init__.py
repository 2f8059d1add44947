"""Verifiers: scores of responses, (prompt, response) -> [0, 1]."""

from opd_lightning.verifiers.base import Rewards, Verifier
from opd_lightning.verifiers.by_domain import ByDomainVerifier
from opd_lightning.verifiers.code import CodeVerifier
from opd_lightning.verifiers.exact import ExactMatch
from opd_lightning.verifiers.judge import JudgeVerifier
from opd_lightning.verifiers.length import LengthLimit
from opd_lightning.verifiers.math import MathVerifier
from opd_lightning.verifiers.reasoning_gym import ReasoningGymVerifier
from opd_lightning.verifiers.reflector import Reflector
from opd_lightning.verifiers.regex import RegexMatch
from opd_lightning.verifiers.weighted import Part, WeightedVerifier

__all__ = [
    "ByDomainVerifier",
    "CodeVerifier",
    "ExactMatch",
    "JudgeVerifier",
    "LengthLimit",
    "MathVerifier",
    "Part",
    "ReasoningGymVerifier",
    "Reflector",
    "RegexMatch",
    "Rewards",
    "Verifier",
    "WeightedVerifier",
]
