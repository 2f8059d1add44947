"""The split of a step into micro-batches: complete, of least cost, with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest

from opd_lightning.data.micro_batches import micro_batches_within, split_by_cost
from opd_lightning.types import Rollout
from tests.batches import make_rollout

Split = list[list[Rollout]]


def rollouts_of(
    lengths: Sequence[int], views: Sequence[dict[str, list[int] | None]] = ()
) -> list[Rollout]:
    more = views or [{}] * len(lengths)
    return [
        make_rollout([7] * n, prompt_ids=[i], views=view)
        for i, (n, view) in enumerate(zip(lengths, more, strict=True))
    ]


def cost(part: Sequence[Rollout]) -> int:
    """Positions of a padded micro-batch, over the student's view and the others."""
    longest = max(1 + len(r.response_ids) for r in part)
    for name in part[0].views:
        longest += max(len(r.views[name] or [0]) + len(r.response_ids) for r in part)
    return len(part) * longest


@pytest.mark.parametrize("parts", [1, 2, 7, 49, 50])
def test_every_rollout_is_in_one_micro_batch_the_longest_first(parts: int) -> None:
    rollouts = rollouts_of([(i * 37) % 101 + 1 for i in range(50)])
    split = split_by_cost(rollouts, parts)
    assert [bool(part) for part in split] == [True] * parts
    assert sorted(r.prompt_ids for part in split for r in part) == [r.prompt_ids for r in rollouts]
    lengths = [len(r.response_ids) for part in split for r in part]
    assert lengths == sorted(lengths, reverse=True)


def test_equal_lengths_are_dealt_evenly_in_their_order() -> None:
    split = split_by_cost(rollouts_of([5] * 12), 4)
    assert [[r.prompt_ids[0] for r in part] for part in split] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip


def test_fewer_rollouts_than_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot fill"):
        split_by_cost(rollouts_of([1, 2]), 3)


def least_cost(ordered: list[Rollout], parts: int) -> int:
    """Of all splits in this order, by enumeration."""
    return min(
        max(cost(ordered[start:end]) for start, end in pairwise((0, *cuts, len(ordered))))
        for cuts in combinations(range(1, len(ordered)), parts - 1)
    )


def random_rollouts(random: Random) -> list[Rollout]:
    """One to nine, under two views."""
    count = random.randint(1, 9)
    views = [
        {"other": None if random.random() < 0.2 else [1] * random.randint(1, 40)}
        for _ in range(count)
    ]
    return rollouts_of([random.randint(0, 30) for _ in range(count)], views)


@pytest.mark.parametrize("seed", range(20))
def test_no_split_in_order_of_length_has_a_lower_maximum(seed: int) -> None:
    random = Random(seed)
    rollouts = random_rollouts(random)
    parts = random.randint(1, len(rollouts))
    split = split_by_cost(rollouts, parts)
    ordered = [r for part in split for r in part]
    assert max(map(cost, split)) == least_cost(ordered, parts)


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_needs_no_more_micro_batches_than_any_split_in_order(seed: int) -> None:
    random = Random(seed)
    rollouts = random_rollouts(random)
    (ordered,) = split_by_cost(rollouts, 1)
    largest = cost(ordered[:1])
    budget = random.randint(largest, 3 * largest)
    fits = [n for n in range(1, len(ordered) + 1) if least_cost(ordered, n) <= budget]
    assert micro_batches_within(rollouts, budget) == min(fits)
    assert max(map(cost, split_by_cost(rollouts, min(fits)))) <= budget


def test_a_rollout_beyond_the_budget_is_alone() -> None:
    rollouts = rollouts_of([20, 3, 2, 2])
    assert micro_batches_within(rollouts, 9) == 3  # 21; 2 x 4; 3


def test_a_view_that_a_row_lacks_costs_what_the_students_prompt_does() -> None:
    row = make_rollout([7], prompt_ids=[5] * 10, views={"other": None})
    assert [micro_batches_within([row, row], budget) for budget in (43, 44)] == [2, 1]


DRAWS = {
    "lognormal": lambda draw: np.minimum(draw.lognormal(7.1, 0.7, 512), 4096),
    "heavy": lambda draw: np.minimum(draw.lognormal(7.8, 1.0, 512), 16384),
    "short": lambda draw: np.minimum(draw.lognormal(4.5, 0.7, 512), 512),
}


@pytest.mark.parametrize("parts", [16, 32, 128])
@pytest.mark.parametrize("kind", DRAWS)
def test_there_is_little_padding(kind: str, parts: int) -> None:
    """512 responses with a tail; one of the longest in every micro-batch gives 2.0 to 4.4."""
    lengths = DRAWS[kind](np.random.default_rng(0)).astype(int)
    split = split_by_cost(rollouts_of(list(lengths)), parts)
    real = sum(1 + n for n in lengths)
    assert sum(map(cost, split)) / real < 1.11
    # No micro-batch costs more than the same number of rows of the greatest length.
    assert max(map(cost, split)) <= 512 // parts * (1 + max(lengths))


@pytest.mark.parametrize("parts", [1, 5, 16])
def test_packed_micro_batches_have_equal_numbers_of_tokens(parts: int) -> None:
    lengths = [(i * 37) % 101 + 1 for i in range(50)]
    split = split_by_cost(rollouts_of(lengths), parts, packed=True)
    tokens = [sum(1 + len(r.response_ids) for r in part) for part in split]
    fair = sum(1 + n for n in lengths) / parts
    assert max(tokens) < fair + max(lengths) + 1
    assert micro_batches_within(rollouts_of(lengths), max(tokens), packed=True) <= parts


def test_packed_samples_of_a_prompt_stay_together() -> None:
    """In order of the longest of them; a prompt is cut only where a micro-batch ends."""
    random = Random(0)
    rollouts = [
        make_rollout([7] * random.randint(1, 99), prompt_ids=[5], group=i % 5) for i in range(20)
    ]
    for parts in (1, 5, 7):
        split = split_by_cost(rollouts, parts, packed=True)
        order = [r for part in split for r in part]
        assert sorted(map(id, order)) == sorted(map(id, rollouts))
        assert len(order[0].response_ids) == max(len(r.response_ids) for r in rollouts)
        changes = sum(a.group != b.group for a, b in pairwise(order))
        assert changes == 4
        longest = [max(len(r.response_ids) for r in order[i : i + 4]) for i in range(0, 20, 4)]
        assert longest == sorted(longest, reverse=True)
