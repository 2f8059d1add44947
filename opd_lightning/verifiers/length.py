"""Scores of the length of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


class LengthLimit(Verifier):
    """Verifier that scores 1 up to a length, 0 from another, and linearly between them.

    The shape of DAPO's soft overlong punishment (2503.14476, from secondary sources), in
    characters. Meant as a part of `WeightedVerifier`; prompts need no answer.

    Args:
        full: Characters up to which a response scores 1.
        zero: Characters from which a response scores 0; more than `full`.
    """

    def __init__(self, full: int, zero: int) -> None:
        if not 0 <= full < zero:
            raise UserError(
                f"LengthLimit: got full {full} and zero {zero}, expected 0 <= full < zero"
            )
        self.full = full
        self.zero = zero

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        span = self.zero - self.full
        return [min(1.0, max(0.0, (self.zero - len(text)) / span)) for text in responses]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Accept all prompts: only the response is read."""
