"""The arithmetic world: column sums and differences with all carries and borrows written out.

The prompt is "347+589="; the response works from the last column to the first:

    347+589=   7+9+0:16,4+8+1:13,3+5+1:9;936      digit + digit + carry : total
    523-147=   13-7-0:6,12-4-1:7,5-1-1:3;376      digit (plus the borrowed ten) - digit - borrow

The carry is the tens digit of the previous total. A borrow follows a column whose first digit was
increased by ten. The final answer follows the only semicolon. A domain, such as "add-3" or "sub-2",
is an operation and the number of digits of both operands, which have no leading zeros.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opd_lightning.errors import UserError
from opd_lightning.lab import problems

# Matches the final answer of a response; used by the verifiers of the lab's configurations.
ANSWER_PATTERN = r";(-?\d+)$"

_SIGNS = {"add": "+", "sub": "-"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Two numbers to add or subtract; differences are never negative."""

    domain: str  # "add-3": the operation and the number of digits
    left: int
    right: int

    @property
    def question(self) -> str:
        """Return the user's message, such as "347+589="."""
        return f"{self.left}{_SIGNS[self.domain[:3]]}{self.right}="

    @property
    def answer(self) -> str:
        """Return the final answer, without leading zeros."""
        adds = self.domain.startswith("add")
        return str(self.left + self.right if adds else self.left - self.right)

    @property
    def solution(self) -> str:
        """Return the full worked response, including the final answer."""
        work = _add_columns if self.domain.startswith("add") else _subtract_columns
        # Reversed, because columns are worked from the ones upwards.
        lefts, rights = ([int(c) for c in str(n)[::-1]] for n in (self.left, self.right))
        return ",".join(work(lefts, rights)) + ";" + self.answer


def _add_columns(lefts: Sequence[int], rights: Sequence[int]) -> Iterable[str]:
    carry = 0
    for left, right in zip(lefts, rights, strict=True):
        total = left + right + carry
        yield f"{left}+{right}+{carry}:{total}"
        carry = total // 10


def _subtract_columns(lefts: Sequence[int], rights: Sequence[int]) -> Iterable[str]:
    borrow = 0
    for left, right in zip(lefts, rights, strict=True):
        takes_ten = int(left < right + borrow)
        top = left + 10 * takes_ten
        yield f"{top}-{right}-{borrow}:{top - right - borrow}"
        borrow = takes_ten


def _parse_domain(domain: str) -> tuple[str, int]:
    operation, _, digits = domain.partition("-")
    if operation not in _SIGNS or not digits.isdecimal() or int(digits) < 1:
        raise UserError(
            f"arithmetic domain: got {domain!r}, expected add-<digits> or sub-<digits>, "
            "for example add-3"
        )
    return operation, int(digits)


def generate(domain: str, count: int, *, seed: int, held_out: bool) -> list[Problem]:
    """Draw `count` distinct problems of a domain, from its training or held-out part.

    Example: generate("add-3", 2, seed=0, held_out=False)
    """
    operation, digits = _parse_domain(domain)
    lowest, highest = 10 ** (digits - 1), 10**digits - 1
    numbers = highest - lowest + 1
    pairs = numbers**2 if operation == "add" else numbers * (numbers + 1) // 2
    rng = random.Random(f"arithmetic/{domain}/{seed}/{held_out}")

    def draw() -> Problem:
        left, right = rng.randint(lowest, highest), rng.randint(lowest, highest)
        if operation == "sub":
            left, right = max(left, right), min(left, right)
        return Problem(domain, left, right)

    return problems.distinct(
        draw, count, existing=pairs, held_out=held_out, domain=f"arithmetic domain {domain}"
    )


def generate_mixture(
    domains: Sequence[str], count_per_domain: int, *, seed: int, held_out: bool
) -> list[problems.Problem]:
    """Draw equally many problems of every domain, interleaved, so any prefix is balanced."""
    return problems.interleaved(
        *(generate(d, count_per_domain, seed=seed, held_out=held_out) for d in domains)
    )
