"""Problems with a unique question, in training and held-out parts, and their prompt files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from opd_lightning.errors import UserError

# One problem in this many is held out for evaluation.
HELD_OUT_ONE_IN = 10


class Problem(Protocol):
    """A question of a domain, with the answer for verifiers and a response that is correct."""

    @property
    def domain(self) -> str: ...
    @property
    def question(self) -> str: ...  # the user's message; ends in one character of punctuation
    @property
    def answer(self) -> str: ...
    @property
    def solution(self) -> str: ...


P = TypeVar("P", bound=Problem)
Q = TypeVar("Q")
Row = dict[str, object]  # row of a prompt file


def is_held_out(problem: Problem) -> bool:
    """Return whether a problem is for evaluation only.

    Depends only on the question: training and evaluation are disjoint for any seed and count.
    """
    digest = hashlib.blake2b(problem.question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def distinct(
    draw: Callable[[], P], count: int, *, existing: int, held_out: bool, domain: str
) -> list[P]:
    """Draw `count` distinct problems from the training or held-out part.

    Args:
        draw: Returns a random problem, which can be hashed.
        count: Number of problems.
        existing: Number of different problems that `draw` can return.
        held_out: Whether they are for evaluation.
        domain: Name in messages.

    Raises:
        UserError: The part has fewer problems.
    """
    seen: set[P] = set()
    problems: list[P] = []
    while len(problems) < count:
        if len(seen) == existing:
            raise UserError(
                f"{domain}: {count} problems asked for, but its "
                f"{'held-out' if held_out else 'training'} part has only {len(problems)}"
            )
        problem = draw()
        if problem not in seen and is_held_out(problem) == held_out:
            problems.append(problem)
        seen.add(problem)
    return problems


def interleaved(*drawn: Sequence[Problem]) -> list[Problem]:
    """Return equally many problems of every domain in turn, so that any prefix is balanced."""
    return [problem for turn in zip(*drawn, strict=True) for problem in turn]


def opened(openings: Sequence[str], questions: Sequence[Q]) -> Iterator[tuple[str, Q]]:
    """Yield all pairs of opening and question; openings alternate, so any prefix has them all."""
    for turn in range(len(openings)):
        for i, question in enumerate(questions):
            yield openings[(i + turn) % len(openings)], question


def row(problem: Problem) -> Row:
    """Return the row of a prompt file, without a response."""
    return {
        "id": f"{problem.domain}/{problem.question[:-1]}",
        "messages": [{"role": "user", "content": problem.question}],
        "answer": problem.answer,
        "domain": problem.domain,
    }


def write_jsonl(path: Path, problems: Iterable[Problem], *, with_response: bool = False) -> None:
    """Write a prompt file with one problem per row.

    Args:
        path: File to write.
        problems: Problems, in order.
        with_response: Add the solution as "response", for supervised training.
    """
    rows = (row(p) | ({"response": p.solution} if with_response else {}) for p in problems)
    write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a prompt file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
