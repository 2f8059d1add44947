"""Verifiers: rule-based scores of responses, (prompt, response) -> [0, 1]."""

from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.exact import ExactMatch
from opd_lightning.verifiers.math import MathVerifier
from opd_lightning.verifiers.regex import RegexMatch

__all__ = ["ExactMatch", "MathVerifier", "RegexMatch", "Verifier"]
