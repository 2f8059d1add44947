"""Exact match of the final answer, extracted by a regular expression, with the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

WHOLE_RESPONSE = r"(?s)\A.*\Z"


class ExactMatch(Verifier):
    """Verifier that scores 1 if the text extracted from the response is the answer, else 0.

    Args:
        pattern: Regular expression that matches the answer in the response. The last match is
            used, or its group 1 if the pattern has a group. The default is the whole response.
        ignore_case: Treat upper and lower case as equal.

    Surrounding whitespace is ignored on both sides. A response without a match scores 0.
    Example: pattern `answer:\\s*(\\S+)` finds 12 in "3 * 4, so answer: 12".
    """

    def __init__(self, pattern: str = WHOLE_RESPONSE, *, ignore_case: bool = False) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"ExactMatch: 'pattern' must be a regular expression, got {pattern!r} "
                f"({error.msg} at position {error.pos}); correct it"
            ) from error
        self.ignore_case = ignore_case

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response whose answer is its prompt's, else 0.0."""
        pairs = zip(prompts, responses, strict=True)
        return [float(self._matches(prompt, response)) for prompt, response in pairs]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """Return the extracted answers, normalised as for the comparison."""
        found = [self._extract(response) for response in responses]
        return [None if text is None else self._normal(text) for text in found]

    def _matches(self, prompt: Prompt, response: str) -> bool:
        found = self._extract(response)
        return (
            found is not None
            and prompt.answer is not None
            and self._normal(found) == self._normal(prompt.answer)
        )

    def _extract(self, response: str) -> str | None:
        last = None
        for last in self.pattern.finditer(response):  # noqa: B007 - only the last is used
            pass
        if last is None:
            return None
        text: str | None = last.group(1 if self.pattern.groups else 0)
        return text

    def _normal(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self.ignore_case else text
