"""Over ranks, epochs and interruptions every prompt is written as often as every other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from opd_lightning.types import RolloutBatch
from tests.streams import PROMPTS, Run, plain

SAMPLES, PER_STEP, STEPS = 3, 8, 10  # 80 prompts: 8 passes over 10, an epoch of a step each

Seen = Counter[tuple[int, str]]  # (position in the run's order, prompt): responses


def group(world: int, staleness: int, step: int = 0) -> list[Run]:
    return [
        Run(rank=r, world=world, micro=1, per_step=PER_STEP, staleness=staleness, step=step)
        for r in range(world)
    ]


def seen(batches: list[RolloutBatch]) -> Seen:
    return Counter((r.group, r.prompt.id) for batch in batches for r in batch.rollouts)


def saved(runs: list[Run]) -> dict[str, Any]:
    """The checkpoint of all ranks, as gathering makes it."""
    states = [plain(run.stream.state_dict()) for run in runs]
    if "rollouts" in states[0]:
        states[0]["rollouts"] = [row for state in states for row in state["rollouts"]]
    return states[0]


def check(total: Seen, steps: int) -> None:
    """Every position once, with all its samples; every pass has every prompt once."""
    assert sorted(position for position, _ in total) == list(range(PER_STEP * steps))
    assert set(total.values()) == {SAMPLES}
    at = dict(total.keys())
    everyone = sorted(prompt.id for prompt in PROMPTS)
    for first in range(0, PER_STEP * steps, len(PROMPTS)):
        one_pass = [at[p] for p in range(first, first + len(PROMPTS)) if p in at]
        assert len(set(one_pass)) == len(one_pass)
        assert len(one_pass) < len(PROMPTS) or sorted(one_pass) == everyone


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_no_prompt_is_lost_or_seen_twice(world: int, staleness: int) -> None:
    total: Seen = Counter()
    for run in group(world, staleness):
        total += seen(run.steps(STEPS))
    check(total, STEPS)


# Fewer, as many and more processes afterwards; the others of {1, 2, 4, 8} are slow tests.
QUICK = {(1, 2), (2, 1), (2, 2)}
PAIRS = [
    pytest.param(world, after, marks=[] if (world, after) in QUICK else pytest.mark.slow)
    for world in (1, 2, 4, 8)
    for after in (1, 2, 4, 8)
]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("world", "after"), PAIRS)
def test_nor_by_a_resume_at_any_step_and_world_size(world: int, after: int, staleness: int) -> None:
    for step in range(STEPS + 1):
        total: Seen = Counter()
        runs = group(world, staleness)
        for run in runs:
            total += seen(run.steps(step))
        state = saved(runs)
        for run in group(after, staleness, step=step):
            run.stream.load_state_dict(state)
            total += seen(run.steps(STEPS - step))
        check(total, STEPS)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_interruption_at_every_step_changes_nothing(world: int) -> None:
    total: Seen = Counter()
    runs = group(world, staleness=1)
    for step in range(STEPS):
        for run in runs:
            total += seen(run.steps(1))
        state = saved(runs)
        runs = group(world, staleness=1, step=step + 1)
        for run in runs:
            run.stream.load_state_dict(state)
    check(total, STEPS)
