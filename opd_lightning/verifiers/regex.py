"""Match of a regular expression anywhere in the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.patterns import Pattern
from opd_lightning.verifiers.workers import as_score

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


class RegexMatch(Verifier):
    """Verifier that scores 1 if the pattern matches anywhere in the response, else 0.

    For measuring how often a model writes a given text; prompts need no answer.

    Args:
        pattern: Regular expression. Anchors and flags are part of it: `(?s)\\A...\\Z` matches
            the whole response, `\\A(?!.*word)` a first line without the word.
        ignore_case: Treat upper and lower case as equal.
        timeout_seconds: Time limit for one response. A response that takes longer scores 0.
        step_seconds: Time limit for all responses of a call, which are those of a step. Those that
            are not checked by then have no reward.

    Example: pattern `\\bi am\\s+bot\\b` matches in "well, i am bot." and not in "i am bottom."
    """

    def __init__(
        self,
        pattern: str,
        *,
        ignore_case: bool = False,
        timeout_seconds: float = 5.0,
        step_seconds: float = 300.0,
    ) -> None:
        self.pattern = Pattern(
            "RegexMatch",
            pattern,
            ignore_case=ignore_case,
            timeout_seconds=timeout_seconds,
            step_seconds=step_seconds,
        )

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response that the pattern matches, else 0.0; NaN if not checked."""
        texts = [response for _, response in zip(prompts, responses, strict=True)]
        return [as_score(found) for found in self.pattern.is_in(texts)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Accept all prompts: only the response is read."""
