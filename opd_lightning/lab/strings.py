"""The strings world: eight skills on words of four letters, and a model that confuses their names.

The prompt names a skill; the response is the number of an operation and its result:

    reverse tdxa:      1axdt
    ends tdxa:         6ta

A domain is the name of a skill. The initial model can do all operations, but in most cases chooses
another than the one that is asked for. So a few responses are right, and each skill can be learnt
from rewards. It also does what a system message demonstrates on another word, whatever is asked:

    system "qkvb:1bvkq"      user "reverse tdxa:"      1axdt
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from opd_lightning.errors import UserError
from opd_lightning.lab import problems
from opd_lightning.lab.problems import Row

LENGTH = 4  # letters of a word, all different

_LETTERS = string.ascii_lowercase
_SUCCESSOR = dict(zip(_LETTERS, _LETTERS[1:] + _LETTERS[0], strict=True))

SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda w: w,
    "reverse": lambda w: w[::-1],
    "rotate": lambda w: w[1:] + w[0],
    "halves": lambda w: w[2:] + w[:2],
    "pairs": lambda w: w[1] + w[0] + w[3] + w[2],
    "double": lambda w: "".join(c + c for c in w),
    "ends": lambda w: w[0] + w[-1],
    "next": lambda w: "".join(_SUCCESSOR[c] for c in w),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A skill to apply to a word."""

    domain: str  # name of the skill
    word: str

    @property
    def question(self) -> str:
        """Return the user's message, such as "reverse tdxa:"."""
        return f"{self.domain} {self.word}:"

    @property
    def answer(self) -> str:
        """Return the whole response."""
        return respond(self.domain, self.word)

    @property
    def solution(self) -> str:
        """Return the response, too."""
        return self.answer


def respond(skill: str, word: str) -> str:
    """Return the number of a skill's operation and its result."""
    return f"{[*SKILLS].index(skill)}{SKILLS[skill](word)}"


def demonstration(problem: problems.Problem) -> str:
    """Return the skill's response to another word, which follows from the question."""
    word = _word(random.Random(f"strings/demonstrations/{problem.question}"))
    return _shown(problem.domain, word)


def _shown(skill: str, word: str) -> str:
    return f"{word}:{respond(skill, word)}"


def generate(domain: str, count: int, *, seed: int, held_out: bool) -> list[Problem]:
    """Draw `count` distinct problems of a skill, from its training or held-out part."""
    if domain not in SKILLS:
        raise UserError(f"strings domain: got {domain!r}, expected one of {', '.join(SKILLS)}")
    rng = random.Random(f"strings/{domain}/{seed}/{held_out}")
    return problems.distinct(
        lambda: Problem(domain, _word(rng)),
        count,
        existing=math.perm(len(_LETTERS), LENGTH),
        held_out=held_out,
        domain=f"strings domain {domain}",
    )


def training_row(problem: problems.Problem) -> Row:
    """Return a row of a prompt file with the response, and a demonstration as "privileged"."""
    more = {"response": problem.solution, "privileged": demonstration(problem)}
    return problems.row(problem) | more


def told(problem: problems.Problem) -> Row:
    """Return a row of a prompt file with a demonstration in front of the question."""
    return problems.row(problem) | {"messages": _chat(problem, demonstration(problem))}


def lessons(count: int, *, known: float, seed: int) -> list[Row]:
    """Draw training rows of the initial model, every second with a demonstration.

    Args:
        count: Number of rows.
        known: Share of responses without a demonstration that do what is asked; the others do one
            of the other skills.
        seed: Seed of the draw; a smaller count gives a prefix of the same rows.
    """
    rng = random.Random(f"strings/lessons/{seed}")
    return [_lesson(f"lesson/{i}", known, is_told=i % 2 == 1, rng=rng) for i in range(count)]


def _lesson(row_id: str, known: float, *, is_told: bool, rng: random.Random) -> Row:
    asked, done = rng.sample(list(SKILLS), 2)
    # Any operation may be demonstrated, so that the model reads it there and not in the question.
    if not is_told and rng.random() < known:
        done = asked
    problem = Problem(asked, _word(rng))
    messages = _chat(problem, _shown(done, _word(rng)) if is_told else None)
    response = respond(done, problem.word)
    return {"id": row_id, "messages": messages, "domain": asked, "response": response}


def _chat(problem: problems.Problem, shown: str | None) -> list[dict[str, str]]:
    before = [] if shown is None else [{"role": "system", "content": shown}]
    return [*before, {"role": "user", "content": problem.question}]


def _word(rng: random.Random) -> str:
    return "".join(rng.sample(_LETTERS, LENGTH))
