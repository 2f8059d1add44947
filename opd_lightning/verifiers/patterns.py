"""Regular expressions with a time limit for each search."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from opd_lightning.errors import UserError
from opd_lightning.verifiers.workers import Unfinished, Workers

Result = TypeVar("Result")

# Python's `re` cannot be interrupted. Searches of at most STEPS_HERE steps (a fraction of a second)
# run in this process; others run in a worker, which can be killed.
STEPS_HERE = 4e6
LONGEST = 2**24  # characters; longer texts are searched in a worker
WORKERS = 2

# Escapes and classes match one character, whatever is inside of them.
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\(\?(?:P?<\w+>|P=|<?[=!]|[a-zA-Z-]*:?|>|\()")
_COUNTED = re.compile(r"\{(?:(\d+)|\d*,\d*)\}")
_ANCHORED = re.compile(r"(?:\(\?[a-z]+\))?\\A")
_REPEATED = re.compile(r"[*+][?+]?")


class Pattern:
    """Regular expression that is searched for in many texts, with a time limit per text.

    Args:
        owner: Name of the verifier, for messages.
        pattern: The regular expression.
        ignore_case: Treat upper and lower case as equal.
        timeout_seconds: Time limit of one text.
        step_seconds: Time limit of the texts of one call.
    """

    def __init__(
        self,
        owner: str,
        pattern: str,
        *,
        ignore_case: bool = False,
        timeout_seconds: float,
        step_seconds: float,
    ) -> None:
        try:
            self.compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except re.error as error:
            raise UserError(
                f"{owner}: 'pattern' must be a regular expression, got {pattern!r} "
                f"({error.msg} at position {error.pos}); correct it"
            ) from error
        fitting = bisect_right(
            range(LONGEST), STEPS_HERE, key=lambda length: most_steps(self.compiled, length)
        )
        self.longest_here = fitting - 1  # characters; -1 if all texts go to a worker
        self.workers = Workers(
            owner,
            _nothing,
            count=WORKERS,
            timeout_seconds=timeout_seconds,
            step_seconds=step_seconds,
        )

    def is_in(self, texts: Sequence[str]) -> list[bool | Unfinished]:
        """Return whether the pattern matches anywhere in each text."""
        return self._map(_is_in, texts)

    def last(self, texts: Sequence[str]) -> list[str | Unfinished | None]:
        """Return the last match in each text, its group 1 if there is one; None without a match."""
        return self._map(_last, texts)

    def _map(
        self, function: Callable[[re.Pattern[str], str], Result], texts: Sequence[str]
    ) -> list[Result | Unfinished]:
        pattern = self.compiled
        away = [i for i, text in enumerate(texts) if len(text) > self.longest_here]
        killable = self.workers.map(function, [(pattern, texts[i]) for i in away])
        found = dict(zip(away, killable, strict=True))
        return [found[i] if i in found else function(pattern, text) for i, text in enumerate(texts)]


def most_steps(pattern: re.Pattern[str], length: int) -> float:
    """Return a bound of the order of steps that a search in a text of `length` may take.

    With r repetitions, none inside another, it is `length ** (r + 1)`, doubled by every
    alternative; with a pattern that begins with `\\A`, `length ** r`. A repeated group is taken to
    be exponential.
    """
    left = _GROUP.sub("(", _ATOM.sub("x", pattern.pattern))
    if re.search(r"\)(?:[*+]|\{)", left):
        return math.inf
    left = _COUNTED.sub(lambda match: "" if match[1] else "*", left)
    left, repeated = _REPEATED.subn("", left)
    references = len(re.findall(r"\\[1-9]|\(\?P=", pattern.pattern))
    choices = left.count("?") + left.count("|")
    starts = 0 if _ANCHORED.match(pattern.pattern) and "|" not in left else 1
    try:
        return float(max(length, 1)) ** (repeated + references + starts) * 2.0**choices
    except OverflowError:
        return math.inf


def _is_in(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text) is not None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 - only the last is used
        pass
    if last is None:
        return None
    found: str | None = last.group(1 if pattern.groups else 0)
    return found


def _nothing() -> None:
    """Do nothing: a worker needs no warm-up."""
