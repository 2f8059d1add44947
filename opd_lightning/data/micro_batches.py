"""Split of a step's rollouts into micro-batches of equal cost with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from opd_lightning.types import Rollout

Lengths = tuple[int, ...]  # tokens of a rollout under each view, the student's first


def split_by_cost(
    rollouts: Sequence[Rollout], parts: int, *, packed: bool = False
) -> list[list[Rollout]]:
    """Split rollouts into `parts` non-empty micro-batches, longest rollouts first.

    Packed rollouts are ordered by the longest sample of their prompt, and samples of a prompt stay
    together, so that teachers can read a prompt once for all of them (`models/shared_prompts.py`).

    The cost of a micro-batch is its number of positions over all views, padding included unless
    they are packed. Rollouts of similar length need little padding. Among all splits in this
    order, it minimises the maximum cost, so that a micro-batch of short rollouts has more rows. All
    ranks use the same order: micro-batches that are computed at the same time have similar lengths.

    Raises:
        ValueError: If there are fewer rollouts than parts.
    """
    if len(rollouts) < parts:
        raise ValueError(f"{len(rollouts)} rollouts cannot fill {parts} micro-batches")
    cost = _packed_cost if packed else _padded_cost
    longest_first, lengths = _in_order(rollouts, packed)
    if parts == 1:
        return [longest_first]
    # The smallest limit of the cost under which `parts` micro-batches suffice.
    low, high = max(sum(lengths[0]), sum(map(sum, lengths)) // parts), cost(lengths)
    while low < high:
        limit = (low + high) // 2
        if sum(1 for _ in _ends(lengths, limit, packed)) <= parts:
            high = limit
        else:
            low = limit + 1
    ends = [0, *_ends(lengths, high, packed)]
    while len(ends) <= parts:
        bounds = [(start, end) for start, end in pairwise(ends) if end - start > 1]
        start, end = max(bounds, key=lambda bound: cost(lengths[slice(*bound)]))
        ends = sorted([*ends, (start + end) // 2])
    return [longest_first[start:end] for start, end in pairwise(ends)]


def micro_batches_within(rollouts: Sequence[Rollout], budget: int, *, packed: bool = False) -> int:
    """Return the smallest number of micro-batches of cost at most `budget`.

    A rollout that costs more by itself is a micro-batch of its own.
    """
    return sum(1 for _ in _ends(_in_order(rollouts, packed)[1], budget, packed))


def _in_order(rollouts: Sequence[Rollout], packed: bool) -> tuple[list[Rollout], list[Lengths]]:
    """Return the rollouts and their lengths, longest first; packed ones by prompt."""
    own = [sum(_lengths(rollout)) for rollout in rollouts]
    longest: dict[int, int] = {}
    for rollout, length in zip(rollouts, own, strict=True):
        longest[rollout.group] = max(length, longest.get(rollout.group, 0))

    def place(i: int) -> tuple[int, ...]:
        group = rollouts[i].group
        return (-longest[group], group, -own[i]) if packed else (-own[i],)

    ordered = [rollouts[i] for i in sorted(range(len(rollouts)), key=place)]
    return ordered, [_lengths(rollout) for rollout in ordered]


def _lengths(rollout: Rollout) -> Lengths:
    student, response = len(rollout.prompt_ids), len(rollout.response_ids)
    others = (student if ids is None else len(ids) for ids in rollout.views.values())
    return tuple(prompt + response for prompt in (student, *others))


def _padded_cost(lengths: Sequence[Lengths]) -> int:
    """Return the number of positions of one micro-batch, padding included."""
    return len(lengths) * sum(map(max, zip(*lengths, strict=True)))


def _packed_cost(lengths: Sequence[Lengths]) -> int:
    """Return the number of positions of one micro-batch without padding."""
    return sum(map(sum, lengths))


def _ends(lengths: Sequence[Lengths], limit: int, packed: bool) -> Iterator[int]:
    """Yield where each micro-batch ends if it takes as many rows as cost at most `limit`."""
    rows, tokens, longest = 0, 0, lengths[0]
    for place, row in enumerate(lengths):
        tokens += sum(row)
        together = tuple(map(max, longest, row))
        if rows and (tokens if packed else (rows + 1) * sum(together)) > limit:
            yield place
            rows, tokens, together = 0, sum(row), row
        rows, longest = rows + 1, together
    yield len(lengths)
