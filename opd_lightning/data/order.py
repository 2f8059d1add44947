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
        """Return the values besides count and seed that define the prompts of earlier steps."""
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

    Each slot of a step goes to the label with the largest deficit against its cumulative share.
    After any step every label is less than one prompt ahead of its share. The prompts of a label
    are taken in separate passes, and the slots of a step are shuffled. The order depends only on
    seed, labels and shares. Computing step n once costs the counts of all earlier steps.

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
        self._deficit = dict.fromkeys(self.shares, 0.0)  # slots by the shares, minus those taken
        self._taken = [dict.fromkeys(self.shares, 0)]  # slots before each step
        self._slots: tuple[int, list[int]] = (-1, [])  # a step, and its shuffled slots

    def record(self, step: int) -> dict[str, int]:
        return {f"{TAKEN}{label}": count for label, count in self._before(step).items()}

    def _at(self, position: int) -> int:
        step, slot = divmod(position, self.per_step)
        before, after = self._before(step), self._before(step + 1)
        if self._slots[0] != step:
            order = _shuffled(self.per_step, derive_seed(STEP_ORDER, self.seed, step))
            self._slots = step, order
        rest = self._slots[1][slot]
        for label, own in self._orders.items():
            here = after[label] - before[label]
            if rest < here:
                (chosen,) = own.take(before[label] + rest, 1)
                return self._members[label][chosen]
            rest -= here
        raise AssertionError("the counts of a step add up to its slots")

    def _before(self, step: int) -> dict[str, int]:
        """Return the number of slots of each label in the steps before `step`."""
        while len(self._taken) <= step:
            counts = self._next(len(self._taken) - 1)
            last = self._taken[-1]
            self._taken.append({label: last[label] + counts[label] for label in last})
        return self._taken[step]

    def _next(self, step: int) -> dict[str, int]:
        """Return the slots of each label in the next step, and carry over the remainders."""
        shares = shares_at(self.shares, step)
        for label, share in shares.items():
            self._deficit[label] += self.per_step * share
        # Assign the slots that no other label can claim at once, the rest one at a time.
        counts = {
            label: max(0, math.floor(slots) - len(self.shares)) if shares[label] else 0
            for label, slots in self._deficit.items()
        }
        for _ in range(self.per_step - sum(counts.values())):
            neediest = max(
                (label for label in shares if shares[label]),
                key=lambda label: self._deficit[label] - counts[label],
            )
            counts[neediest] += 1
        for label, count in counts.items():
            self._deficit[label] -= count
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
