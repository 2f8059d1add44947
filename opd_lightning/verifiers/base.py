"""The verifier contract: responses in, scores in [0, 1] out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    # Not at run time: verifiers' worker processes need neither torch nor its memory.
    from opd_lightning.types import Prompt


class Verifier(ABC):
    """Scores responses against their prompts' reference answers."""

    @abstractmethod
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One score in [0, 1] per (prompt, response text without special tokens) pair."""

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """What to tell the author of each response (SDPO's feedback); None for nothing."""
        return [None] * len(responses)

    def answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        """What each response comes to, for a majority vote: equal answers, equal texts.

        None for a response without an answer; None for all from a verifier that cannot tell.
        """
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, unless every prompt has an answer.

        A verifier that needs something else, or nothing, says so here.
        """
        for prompt in prompts:
            if not (prompt.answer or "").strip():
                raise UserError(
                    f"{prompt.origin or prompt.id}: {type(self).__name__} needs an 'answer' to "
                    f"compare with, got {prompt.answer!r}; add it to the row or train without a "
                    "verifier"
                )
