"""Mathematical equality of answers, checked by math-verify in worker processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.workers import Unfinished, Workers, as_score

if TYPE_CHECKING:
    # Not at run time: the workers import this module and need neither torch nor its memory.
    from opd_lightning.types import Prompt


# Above these, parsing takes more than seconds: brackets are read with backtracking, digits and
# lists in quadratic time. What is below may take too long as well, so there are time limits too.
MOST_DIGITS = 100_000  # limit of one number
MOST_BOXES = 5_000
MOST_ITEMS = 2_000  # in the final answer, as are the next two
MOST_OPEN = 150  # brackets inside of one another
MOST_OPENED = 15  # brackets, one directly after the other

# Thousands as LaTeX separates them, which math-verify would read as a product: 1\,000, 1~000.
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,:; ]|~)\d{3})+(?!\d)")
_SPACED = re.compile(r"(?<=\\boxed\{)-?\d{1,3}(?: \d{3})+(?=[.}])")  # LaTeX ignores the spaces
_FORMULA = re.compile(r"\$([^$]*)\$|\\\[(.*?)\\\]|\\\((.*?)\\\)", re.DOTALL)


class MathVerifier(Verifier):
    """Verifier that scores 1 if the final answer equals the prompt's mathematically, else 0.

    Of several boxes, the last alone is an answer, and so are all of them as a set.

    Args:
        max_workers: Number of worker processes that check answers in parallel.
        timeout_seconds: Time limit for one response. A response that takes longer, or crashes its
            worker, scores 0.
        step_seconds: Time limit for all responses of a call, which are those of a step. Those that
            are not checked by then have no reward.

    `timeouts` counts the responses that took too long or crashed a worker.
    """

    def __init__(
        self, *, max_workers: int = 2, timeout_seconds: float = 5.0, step_seconds: float = 300.0
    ) -> None:
        self.workers = Workers(
            "MathVerifier",
            prepare_worker,
            count=max_workers,
            timeout_seconds=timeout_seconds,
            step_seconds=step_seconds,
        )

    @property
    def timeouts(self) -> int:
        return self.workers.timeouts

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response with a correct answer, else 0.0; NaN if not checked."""
        pairs = zip(prompts, responses, strict=True)
        items = [(prompt.answer or "", text) for prompt, text in pairs]
        return [as_score(right) for right in self.workers.map(is_right, items)]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """Return final answers as expressions; those equal only after algebra differ."""
        found = self.workers.map(final_answer, [(text,) for text in responses])
        return [None if isinstance(answer, Unfinished) else answer for answer in found]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, unless every prompt has an answer to parse."""
        super().check(prompts)
        for prompt in prompts:
            if not is_parsable(f"\\boxed{{{prompt.answer}}}"):
                raise UserError(
                    f"{prompt.origin or prompt.id}: MathVerifier cannot parse an 'answer' of "
                    f"{len(prompt.answer or '')} characters, so long a number or list or so deeply "
                    "nested; correct the row"
                )

    def close(self) -> None:
        """Stop the workers; the next `verify` starts new ones."""
        self.workers.close()


def prepare_worker() -> None:
    """Warm up a worker before the time limit of its first response starts."""
    # math-verify warns that its time limits are off, which is intended.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Many imports and compilations happen only at the first check of an answer.
    is_right("1", r"\boxed{1}")


def is_right(answer: str, response: str) -> bool:
    """Return whether the final answer in the response equals the reference; runs in a worker."""
    from math_verify import parse, verify

    reference = _join_thousands(f"\\boxed{{{answer}}}")
    response = _join_thousands(response)
    if not (is_parsable(reference) and is_parsable(response)):
        return False
    gold = parse(reference, parsing_timeout=None)
    # The parser reads boxes outside of formulas as a set, also those of a corrected answer.
    texts = [response, _last_formula(response)] if response.count("\\boxed") > 1 else [response]
    return any(
        verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) for text in texts
    )


def final_answer(response: str) -> str | None:
    """Return the final answer in the response, as sympy prints it; runs in a worker."""
    from math_verify import parse

    response = _join_thousands(response)
    if not is_parsable(response):
        return None
    found = parse(response, parsing_timeout=None)
    return str(found[0]) if found else None


def is_parsable(response: str) -> bool:
    """Return whether parsing may end in time, by the lengths of what would be parsed."""
    if max((len(run) for run in re.findall(r"\d+", response)), default=0) > MOST_DIGITS:
        return False
    if response.count("\\boxed") > MOST_BOXES:
        return False
    answer = _last_formula(response)
    if answer.count(",") > MOST_ITEMS or re.search(rf"(?:[({{[]\s*){{{MOST_OPENED + 1}}}", answer):
        return False
    depth = deepest = 0
    for bracket in re.findall(r"[(){}\[\]]", answer):
        depth = depth + 1 if bracket in "({[" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest <= MOST_OPEN


def _join_thousands(text: str) -> str:
    """Return a text whose numbers have no spaces."""
    for numbers in (_THOUSANDS, _SPACED):
        text = numbers.sub(lambda found: re.sub(r"[^-\d]", "", found[0]), text)
    return text


def _last_formula(response: str) -> str:
    """Return the text from the last box on, or else the last formula; empty without either."""
    box = response.rfind("\\boxed")
    if box >= 0:
        return response[box:]
    formulas: list[tuple[str, ...]] = _FORMULA.findall(response)
    return "".join(formulas[-1]) if formulas else ""
