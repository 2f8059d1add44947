"""Tiny string programs: a task in words, and a Python function that does it.

The prompt names operations, applied from left to right; the response is the whole program:

    append a,double:        f=lambda s:(s+'a')*2
    upper,prepend x:        f=lambda s:'x'+s.upper()

Verifiers run the program on a few texts. The answer of a problem has these texts and the results,
in a format that `CodeVerifier` reads. A domain, such as "program-2", has the number of operations.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from opd_lightning.errors import UserError
from opd_lightning.lab import problems

# Beginning of every program.
HEADER = "f=lambda s:"

_SUM, _PRODUCT, _PRIMARY = range(3)  # precedence of the expressions below, lowest first


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of operation; `{e}` is the text it is applied to, `{x}` its letter."""

    expression: str
    precedence: int  # of the expression; an operand of a lower one is put in parentheses
    has_letter: bool
    apply: Callable[[str, str], str]  # (text, letter) -> text


_KINDS = {
    "append": _Kind("{e}+'{x}'", _SUM, True, lambda s, x: s + x),
    "prepend": _Kind("'{x}'+{e}", _SUM, True, lambda s, x: x + s),
    "double": _Kind("{e}*2", _PRODUCT, False, lambda s, x: s * 2),
    "triple": _Kind("{e}*3", _PRODUCT, False, lambda s, x: s * 3),
    "upper": _Kind("{e}.upper()", _PRIMARY, False, lambda s, x: s.upper()),
    "lower": _Kind("{e}.lower()", _PRIMARY, False, lambda s, x: s.lower()),
    "strip": _Kind("{e}.strip('{x}')", _PRIMARY, True, lambda s, x: s.strip(x)),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """A step of a program, such as "append a"."""

    kind: Literal["append", "prepend", "double", "triple", "upper", "lower", "strip"]
    letter: str = ""

    @property
    def words(self) -> str:
        return f"{self.kind} {self.letter}".strip()


@dataclass(frozen=True, slots=True)
class Problem:
    """Operations that a program applies to its argument, in order."""

    domain: str  # "program-2": the number of operations
    operations: tuple[Operation, ...]

    @property
    def question(self) -> str:
        """Return the user's message, such as "append a,double:"."""
        return ",".join(operation.words for operation in self.operations) + ":"

    @property
    def answer(self) -> str:
        """Return texts and results as JSON, to run a program against."""
        texts = self._texts()
        return json.dumps(
            {
                "fn_name": "f",
                "inputs": [[text] for text in texts],
                "outputs": [self.apply(text) for text in texts],
            }
        )

    @property
    def solution(self) -> str:
        """Return a program, in the characters of the lab's tokenizer."""
        text, precedence = "s", _PRIMARY
        for operation in self.operations:
            kind = _KINDS[operation.kind]
            inner = text if precedence >= kind.precedence else f"({text})"
            text = kind.expression.format(e=inner, x=operation.letter)
            precedence = kind.precedence
        return HEADER + text

    def apply(self, text: str) -> str:
        """Return the result of the operations."""
        for operation in self.operations:
            text = _KINDS[operation.kind].apply(text, operation.letter)
        return text

    def _texts(self) -> list[str]:
        """Return three texts, of which a program of other operations fails at least one.

        They have letters of both cases, and at their ends nothing, or the letters to strip as they
        are and in upper case.
        """
        rng = random.Random(f"programs/texts/{self.question}")
        stripped = "".join(o.letter for o in self.operations if o.kind == "strip")
        texts = []
        for number, ends in enumerate(("", stripped, stripped.upper())):
            inner = rng.choices(string.ascii_letters, k=2 + number)
            texts.append(f"{ends}{rng.choice('abc')}{''.join(inner)}{rng.choice('XYZ')}{ends}")
        return texts


def _parse_domain(domain: str) -> int:
    name, _, operations = domain.partition("-")
    if name != "program" or not operations.isdecimal() or int(operations) < 1:
        raise UserError(
            f"program domain: got {domain!r}, expected program-<operations>, for example program-2"
        )
    return int(operations)


def generate(domain: str, count: int, *, seed: int, held_out: bool) -> list[Problem]:
    """Draw `count` distinct problems of a domain, from its training or held-out part.

    Example: generate("program-2", 2, seed=0, held_out=False)
    """
    length = _parse_domain(domain)
    rng = random.Random(f"programs/{domain}/{seed}/{held_out}")
    single = sum(len(string.ascii_lowercase) if kind.has_letter else 1 for kind in _KINDS.values())

    def draw() -> Problem:
        return Problem(domain, tuple(_draw_operation(rng) for _ in range(length)))

    return problems.distinct(
        draw, count, existing=single**length, held_out=held_out, domain=f"program domain {domain}"
    )


def _draw_operation(rng: random.Random) -> Operation:
    name = rng.choice(list(_KINDS))
    letter = rng.choice(string.ascii_lowercase) if _KINDS[name].has_letter else ""
    return Operation(name, letter)  # type: ignore[arg-type]
