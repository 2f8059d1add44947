"""Orders in which a run takes its prompts: functions of seed and position, without a state."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.seeding import PROMPT_ORDER, STEP_ORDER, derive_seed

TAKEN = "prompts of "  # begins the entries of `SharedOrder.record`


class PromptOrder:
    """Endless passes over `count` prompts, each pass shuffled with its own seed.

    Positions are absolute, so the prompts of any step can be computed. There is no state to
    save, no prompt is dropped at the end of a pass, and the order is independent of world size.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._pass = -1
        self._permutation: list[int] = []

    def take(self, start: int, number: int) -> list[int]:
        """Return the prompt indices at positions start .. start + number - 1."""
        return [self._at(position) for position in range(start, start + number)]

    def record(self, step: int) -> dict[str, int]:
        """Return what decides, besides count and seed, the prompts of the steps before `step`."""
        return {}

    def _at(self, position: int) -> int:
        nth_pass, offset = divmod(position, self.count)
        if nth_pass != self._pass:
            self._permutation = _shuffled(
                self.count, derive_seed(PROMPT_ORDER, self.seed, nth_pass)
            )
            self._pass = nth_pass
        return self._permutation[offset]


class SharedOrder(PromptOrder):
    """Order in which every step has given shares of prompts by label.

    A step's places go one after the other to the label that is furthest behind the sum of its
    shares so far, so that after any step no label is a prompt or more ahead. The prompts of a label
    are taken in passes of their own, and the places of a step are shuffled. All of it follows from
    the seed, the labels and the shares; step n costs the counts of the steps before it once.

    Args:
        labels: Label of every prompt, such as its domain.
        shares: Share of every label, relative to the others, or a schedule of the optimiser step.
        per_step: Prompts of a step, over all ranks.
        seed: `data.seed`.
    """

    def __init__(
        self,
        labels: Sequence[str],
        shares: Mapping[str, float | Schedule],
        per_step: int,
        seed: int,
    ) -> None:
        super().__init__(len(labels), seed)
        self.shares = dict(sorted(shares.items()))
        self.per_step = per_step
        self._members: dict[str, list[int]] = {label: [] for label in self.shares}
        for index, label in enumerate(labels):
            self._members[label].append(index)
        self._orders = {
            label: PromptOrder(
                len(members), derive_seed(PROMPT_ORDER, seed, zlib.crc32(label.encode()))
            )
            for label, members in self._members.items()
        }
        self._owed = dict.fromkeys(self.shares, 0.0)  # places by the shares, minus those taken
        self._taken = [dict.fromkeys(self.shares, 0)]  # places before each step
        self._places: tuple[int, list[int]] = (-1, [])  # a step, and its shuffled places

    def record(self, step: int) -> dict[str, int]:
        return {f"{TAKEN}{label}": count for label, count in self._before(step).items()}

    def _at(self, position: int) -> int:
        step, place = divmod(position, self.per_step)
        before, after = self._before(step), self._before(step + 1)
        if self._places[0] != step:
            order = _shuffled(self.per_step, derive_seed(STEP_ORDER, self.seed, step))
            self._places = step, order
        rest = self._places[1][place]
        for label, own in self._orders.items():
            here = after[label] - before[label]
            if rest < here:
                (chosen,) = own.take(before[label] + rest, 1)
                return self._members[label][chosen]
            rest -= here
        raise AssertionError("the counts of a step add up to its places")

    def _before(self, step: int) -> dict[str, int]:
        """Return how many places each label has in the steps before `step`."""
        while len(self._taken) <= step:
            counts = self._next(len(self._taken) - 1)
            last = self._taken[-1]
            self._taken.append({label: last[label] + counts[label] for label in last})
        return self._taken[step]

    def _next(self, step: int) -> dict[str, int]:
        """Return the places of each label in the next step, and owe the rest."""
        shares = shares_at(self.shares, step)
        for label, share in shares.items():
            self._owed[label] += self.per_step * share
        # Whole places that nobody else can get first; the others one by one.
        counts = {
            label: max(0, math.floor(owed) - len(self.shares)) if shares[label] else 0
            for label, owed in self._owed.items()
        }
        for _ in range(self.per_step - sum(counts.values())):
            furthest = max(
                (label for label in shares if shares[label]),
                key=lambda label: self._owed[label] - counts[label],
            )
            counts[furthest] += 1
        for label, count in counts.items():
            self._owed[label] -= count
        return counts


def shares_at(shares: Mapping[str, float | Schedule], step: int) -> dict[str, float]:
    """Return the shares of an optimiser step, of sum 1. Raise `UserError` if that cannot be."""
    values = {label: value_at(share, step) for label, share in shares.items()}
    for label, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(
                f"shares: {label!r} has {value} at step {step}, expected a finite number of 0 or "
                "more"
            )
    total = math.fsum(values.values())
    if not total:
        raise UserError(f"shares: all are 0 at step {step}, expected one above 0")
    return {label: value / total for label, value in values.items()}


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
