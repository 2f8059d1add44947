"""The verifier contract: responses in, scores in [0, 1] out."""

from collections.abc import Sequence
from typing import Protocol

from opd_lightning.types import Prompt


class Verifier(Protocol):
    """Scores responses against their prompts' reference answers."""

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score in [0, 1] per (prompt, response text without special tokens) pair."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, if a prompt lacks what the verifier needs."""
        ...
