"""Rule-based scores for responses: (prompt, response) -> [0, 1]."""

from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.exact import ExactMatch
from opd_lightning.verifiers.math import MathVerifier

__all__ = ["ExactMatch", "MathVerifier", "Verifier"]
