"""Pattern match: whether a regular expression is found in the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


class RegexMatch(Verifier):
    """Scores 1 where the pattern is found anywhere in the response, else 0.

    For measuring what a model says of its own accord, so prompts need no answer.

    Args:
        pattern: Regular expression to look for. Anchors and flags are part of it: `(?s)\\A...\\Z`
            means the whole response, `\\A(?!.*word)` a first line without the word.
        ignore_case: Treat upper and lower case as equal.

    Example: pattern `\\bi am\\s+bot\\b` is found in "well, i am bot." and not in "i am bottom."
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
        """1.0 for each response with the pattern in it, else 0.0."""
        pairs = zip(prompts, responses, strict=True)
        return [float(self.pattern.search(response) is not None) for _, response in pairs]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to ask of a prompt: only the response is looked at."""
