"""Base class of verifiers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    # Not at run time: verifiers' worker processes need neither torch nor its memory.
    from opd_lightning.types import Prompt


class Verifier(ABC):
    """Base of verifiers, which score responses against the reference answers of their prompts."""

    @abstractmethod
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return a score in [0, 1] per (prompt, response text without special tokens) pair.

        NaN for a response that could not be checked for a reason that is not in the response; it
        then has no reward.
        """

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """Return a feedback text for each response, as SDPO uses it; None for no feedback."""
        return [None] * len(responses)

    def answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        """Return the final answer of each response for a majority vote; equal answers, equal texts.

        None for a response without an answer; None as a whole if the verifier extracts no answers.
        """
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, unless every prompt has an answer.

        Verifiers with other requirements, or none, override it.
        """
        for prompt in prompts:
            if not (prompt.answer or "").strip():
                raise UserError(
                    f"{prompt.origin or prompt.id}: {type(self).__name__} needs an 'answer' to "
                    f"compare with, got {prompt.answer!r}; add it to the row or train without a "
                    "verifier"
                )
