"""The verifier contract: responses in, scores in [0, 1] out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Not at run time: verifiers' worker processes need neither torch nor its memory.
    from opd_lightning.types import Prompt


class Verifier(ABC):
    """Scores responses against their prompts' reference answers."""

    @abstractmethod
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score in [0, 1] per (prompt, response text without special tokens) pair."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, if a prompt lacks what the verifier needs."""
