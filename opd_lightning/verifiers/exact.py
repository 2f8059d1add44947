"""Exact match of the final answer, extracted by a regular expression, with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.patterns import Pattern
from opd_lightning.verifiers.workers import Unfinished, as_score

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

WHOLE_RESPONSE = r"(?s)\A.*\Z"


class ExactMatch(Verifier):
    """Verifier that scores 1 if the text extracted from the response is the answer, else 0.

    Args:
        pattern: Regular expression that matches the answer in the response. The last match is
            used, or its group 1 if the pattern has a group. The default is the whole response.
        ignore_case: Treat upper and lower case as equal.
        timeout_seconds: Time limit for the pattern in one response. A response that takes longer
            scores 0.
        step_seconds: Time limit for all responses of a call, which are those of a step. Those that
            are not checked by then have no reward.

    Surrounding whitespace is ignored on both sides. A response without a match scores 0.
    Example: pattern `answer:\\s*(\\S+)` finds 12 in "3 * 4, so answer: 12".
    """

    def __init__(
        self,
        pattern: str = WHOLE_RESPONSE,
        *,
        ignore_case: bool = False,
        timeout_seconds: float = 5.0,
        step_seconds: float = 300.0,
    ) -> None:
        self.pattern = Pattern(
            "ExactMatch", pattern, timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        self.ignore_case = ignore_case

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response with its prompt's answer, else 0.0; NaN if not checked."""
        pairs = list(zip(prompts, responses, strict=True))
        found = self.pattern.last([response for _, response in pairs])
        return [
            as_score(text if isinstance(text, Unfinished) else self._matches(prompt, text))
            for (prompt, _), text in zip(pairs, found, strict=True)
        ]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """Return the extracted answers, normalised as for the comparison."""
        found = self.pattern.last(responses)
        return [self._normal(text) if isinstance(text, str) else None for text in found]

    def _matches(self, prompt: Prompt, found: str | None) -> bool:
        return (
            found is not None
            and prompt.answer is not None
            and self._normal(found) == self._normal(prompt.answer)
        )

    def _normal(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self.ignore_case else text
