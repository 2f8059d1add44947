"""Prefetched rollouts: versions of weights, waiting, content of checkpoints."""

import threading
import time
from typing import Any

import pytest

from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Rollout
from tests.streams import FakeEngine, Run, plain, written


class Gated:
    """A run whose engine writes ahead only when it is let."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.run = Run(self.engine, staleness=1)
        self.batches = iter(self.run)
        self.engine.gate = threading.Event()
        self.engine.gate.set()

    def train_a_step_with_the_gate_closed(self) -> None:
        """Step 0 is over, and step 1 is still being written."""
        assert self.engine.gate is not None
        next(self.batches)
        stream = self.run.stream
        rows = stream._ready_rows(1)
        self.engine.gate.clear()
        self.run.engines.prefetch.start(1, lambda: stream.writer.write(rows, stream.samplings))
        next(self.batches)


def test_a_step_trains_on_rollouts_of_the_weights_before() -> None:
    run = Run(staleness=1)
    batches = run.steps(4)
    versions = {b.totals.step: {r.policy_version for r in b.rollouts} for b in batches}
    assert versions == {0: {0}, 1: {0}, 2: {1}, 3: {2}}
    run.engines.close()
    # Each push follows the end of the writing before it.
    assert run.engine.log == [
        "start", "push 0", "generate",  # step 0
        "generate",  # step 1
        "push 1", "generate", "push 2", "generate", "push 3", "generate", "close",
    ]  # fmt: skip


def test_the_prompts_are_those_of_the_on_policy_run() -> None:
    def what(staleness: int) -> list[list[tuple[str, int]]]:
        batches = written(Run(staleness=staleness).steps(4))
        return [[(r.prompt.id, len(r.response_ids)) for r in batch] for batch in batches]

    assert what(1) == what(0)


def test_two_runs_agree() -> None:
    assert written(Run(staleness=1).steps(5)) == written(Run(staleness=1).steps(5))


def test_training_goes_on_while_the_engine_writes() -> None:
    gated = Gated()
    gated.train_a_step_with_the_gate_closed()
    assert gated.run.step == 1
    assert gated.engine.log[-1] == "generate"
    assert gated.engine.log.count("generate") == 2  # not the third, which is held up
    assert gated.engine.gate is not None
    gated.engine.gate.set()
    gated.run.engines.close()


def test_a_validation_waits_for_the_writer() -> None:
    gated = Gated()
    gated.train_a_step_with_the_gate_closed()
    assert gated.engine.gate is not None
    threading.Timer(0.1, gated.engine.gate.set).start()
    gated.run.engines.prepare([Author.STUDENT])
    assert gated.engine.log[-2:] == ["generate", "push 1"]
    # What was written before the push stays what step 1 learns from.
    assert {r.policy_version for r in next(gated.batches).rollouts} == {0}
    gated.run.engines.close()


def test_a_failure_in_the_thread_is_raised_as_itself() -> None:
    run = Run(staleness=1)
    batches = iter(run)
    next(batches)
    run.engines.prefetch.wait()
    run.engine.fails = True
    next(batches)  # step 0 is over
    next(batches)  # step 1 was written; step 2 fails in the thread
    next(batches)
    # Its rollouts cannot be saved, and saving does not raise: the next step will.
    assert "rollouts" not in run.stream.state_dict()
    with pytest.raises(ConnectionError, match="the engine is gone"):
        run.steps(1)
    run.engines.close()
    assert run.engine.log[-1] == "close"


def test_closing_waits_for_the_thread() -> None:
    threads = set(threading.enumerate())
    gated = Gated()
    gated.train_a_step_with_the_gate_closed()
    assert gated.engine.gate is not None
    threading.Timer(0.1, gated.engine.gate.set).start()
    gated.run.engines.close()
    assert gated.engine.log[-2:] == ["generate", "close"]
    assert set(threading.enumerate()) <= threads


def test_all_ranks_rollouts_are_saved_and_dealt_out_again() -> None:
    """Two ranks save; two others, or one alone, go on."""
    runs = [Run(staleness=1, rank=rank, world=2) for rank in (0, 1)]
    for run in runs:
        run.steps(2)
    parts = [run.stream.state_dict()["rollouts"] for run in runs]
    runs[0].stream.ranks = Run(rank=0, world=2, gather=lambda value: parts).stream.ranks
    state = plain(runs[0].stream.state_dict())

    def resumed(rank: int, world: int) -> list[Any]:
        run = Run(staleness=1, rank=rank, world=world, step=2)
        run.stream.load_state_dict(state)
        return sorted((r.group, r.response_ids) for b in written(run.steps(1)) for r in b)

    unbroken = Run(staleness=1)
    unbroken.steps(2)
    expected = sorted((r.group, r.response_ids) for b in written(unbroken.steps(1)) for r in b)
    assert resumed(0, 2) + resumed(1, 2) == resumed(0, 1) == expected


def test_waiting_and_hidden_time_are_told_apart() -> None:
    timer = StepTimer()
    timer.next_step()
    prefetch = Run(staleness=1).engines.prefetch

    def write() -> list[Rollout]:
        time.sleep(0.2)
        return []

    prefetch.start(1, write)
    time.sleep(0.1)
    assert prefetch.take(0, timer) is None
    assert prefetch.take(1, timer) == []
    timer.next_step()
    # Sleeps have a minimum duration; a busy machine makes them longer.
    waited, hidden = timer.last["generate"], timer.last["generate_hidden"]
    assert waited < timer.last["step"] - 0.09
    assert hidden > 0.09
    assert waited + hidden > 0.19
    prefetch.close()
