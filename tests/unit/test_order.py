"""Orders of prompts with shares: exact counts, curricula, passes, and no state."""

from collections import Counter
from collections.abc import Mapping
from random import Random

import pytest

from opd_lightning.data.order import SharedOrder, shares_at
from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Linear, Schedule
from tests.streams import PROMPTS, Run, plain, rows, written

LABELS = ["a"] * 6 + ["b"] * 3 + ["c"]


def order(seed: int = 0, per_step: int = 4, **shares: float | Schedule) -> SharedOrder:
    return given(shares, seed, per_step)


def given(shares: Mapping[str, float | Schedule], seed: int = 0, per_step: int = 4) -> SharedOrder:
    return SharedOrder(LABELS, shares, per_step, seed)


def counts(of: SharedOrder, step: int) -> Counter[str]:
    return Counter(LABELS[i] for i in of.take(step * of.per_step, of.per_step))


def test_no_label_is_a_prompt_ahead_of_its_share() -> None:
    mixed = order(a=0.61, b=0.29, c=0.1)
    seen: Counter[str] = Counter()
    for step in range(200):
        here = counts(mixed, step)
        assert here.total() == 4
        seen += here
        for label, share in (("a", 0.61), ("b", 0.29), ("c", 0.1)):
            assert abs(seen[label] - 4 * (step + 1) * share) < 1 + 1e-9
    relative = order(a=61, b=29, c=10)
    assert [relative.take(0, 99)] == [mixed.take(0, 99)]


@pytest.mark.parametrize("seed", range(5))
def test_many_labels_get_their_shares_and_none_where_they_have_none(seed: int) -> None:
    random, names = Random(seed), "abcdefgh"
    shares: Mapping[str, float | Schedule] = {
        name: Linear(start=random.random(), end=random.choice([0.0, 1.0]), steps=20)
        for name in names[1:]
    } | {"a": 0.5}
    mixed = SharedOrder(list(names), shares, 5, seed)
    owed = dict.fromkeys(names, 0.0)
    for step in range(40):
        taken = Counter(names[i] for i in mixed.take(5 * step, 5))
        for name, share in shares_at(shares, step).items():
            owed[name] += 5 * share - taken[name]
            assert owed[name] > -1
            assert share or not taken[name]
        assert sum(owed.values()) == pytest.approx(0.0, abs=1e-9)


def test_a_label_is_taken_in_passes_and_places_are_shuffled() -> None:
    mixed = order(a=1, b=2, c=1)
    taken = mixed.take(0, 4 * 12)
    of_b = [i for i in taken if LABELS[i] == "b"]
    assert all(Counter(of_b[:n]) == Counter({6: n / 3, 7: n / 3, 8: n / 3}) for n in (6, 12, 24))
    assert len({tuple(LABELS[i] for i in taken[n : n + 4]) for n in range(0, 48, 4)}) > 3
    assert order(seed=1, a=1, b=2, c=1).take(0, 48) != taken


def test_any_step_is_computed_without_those_before() -> None:
    shares: dict[str, float | Schedule] = {"a": Linear(start=1, end=0, steps=8), "b": 1.0, "c": 0.0}
    expected = given(shares).take(0, 60)
    assert given(shares).take(40, 20) == expected[40:]
    back = given(shares)
    assert [back.take(n, 4) for n in (36, 4, 20)] == [expected[n : n + 4] for n in (36, 4, 20)]


def test_shares_that_are_schedules_are_a_curriculum() -> None:
    mixed = order(per_step=8, a=Linear(start=1, end=0, steps=4), b=Linear(start=0, end=1, steps=4),
                  c=0.0)  # fmt: skip
    steps = [counts(mixed, step) for step in range(6)]
    assert [step["a"] for step in steps] == [8, 6, 4, 2, 0, 0]
    assert [step["b"] for step in steps] == [0, 2, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": -1.0, "b": 1.0, "c": 1.0}, "'a' has -1.0 at step 0"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "all are 0 at step 0"),
        ({"a": Linear(start=1, end=0, steps=2), "b": 0.0, "c": 0.0}, "all are 0 at step 2"),
    ],
)
def test_shares_that_cannot_be(shares: dict[str, float | Schedule], message: str) -> None:
    mixed = given(shares)
    with pytest.raises(UserError, match=message):
        mixed.take(0, 12)


def shared() -> SharedOrder:
    assert len(PROMPTS) == len(LABELS)
    return order(seed=5, a=Linear(start=1, end=0, steps=6), b=1.0, c=0.5)


def test_ranks_and_resumed_runs_take_the_same_prompts() -> None:
    expected = written(Run(order=shared()).steps(6))
    assert expected != written(Run().steps(6))
    together = [row for rank in (0, 1) for row in rows(Run(order=shared(), rank=rank, world=2))]
    assert sorted(together) == sorted(rows(Run(order=shared())))
    first = Run(order=shared())
    first.steps(3)
    second = Run(order=shared(), step=3)
    second.stream.load_state_dict(plain(first.stream.state_dict()))
    assert written(second.steps(3)) == expected[6:]


def test_other_shares_do_not_resume() -> None:
    run = Run(order=shared())
    run.steps(2)
    state = plain(run.stream.state_dict())
    with pytest.raises(UserError, match=r"resume: prompts of \w was"):
        Run(order=order(seed=5, a=1, b=1, c=8), step=2).stream.load_state_dict(state)
    with pytest.raises(UserError, match="resume: prompts of a was 3 in the checkpoint and is None"):
        Run(step=2).stream.load_state_dict(state)
    with pytest.raises(UserError, match="resume: prompts of a was None"):
        Run(order=shared(), step=2).stream.load_state_dict(plain(Run(step=2).stream.state_dict()))
