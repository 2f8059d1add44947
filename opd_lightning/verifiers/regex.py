"""Match of a regular expression anywhere in the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


class RegexMatch(Verifier):
    """Verifier that scores 1 if the pattern matches anywhere in the response, else 0.

    For measuring how often a model writes a given text; prompts need no answer.

    Args:
        pattern: Regular expression. Anchors and flags are part of it: `(?s)\\A...\\Z` matches
            the whole response, `\\A(?!.*word)` a first line without the word.
        ignore_case: Treat upper and lower case as equal.

    Example: pattern `\\bi am\\s+bot\\b` matches in "well, i am bot." and not in "i am bottom."
    """

    def __init__(self, pattern: str, *, ignore_case: bool = False) -> None:
        try:
            self.pattern = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except re.error as error:
            raise UserError(
                f"RegexMatch: 'pattern' must be a regular expression, got {pattern!r} "
                f"({error.msg} at position {error.pos}); correct it"
            ) from error

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response that the pattern matches, else 0.0."""
        pairs = zip(prompts, responses, strict=True)
        return [float(self.pattern.search(response) is not None) for _, response in pairs]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Accept all prompts: only the response is read."""
