"""Worker processes under time limits: calls that hang, workers that die or are signalled."""

import copy
import logging
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from opd_lightning.errors import RunStoppedError
from opd_lightning.verifiers.workers import Unfinished, Workers, as_score
from tests.worker_calls import HANGS, answer, end, nothing

LIMIT = 0.5
GAVE_UP, NOT_CALLED = Unfinished.GAVE_UP, Unfinished.NOT_CALLED


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers("Owner", nothing, count=2, timeout_seconds=60, step_seconds=300)
    yield workers
    workers.close()


def ask(workers: Workers, *values: Any) -> list[Any]:
    return workers.map(answer, [(value,) for value in values])


def start_all(workers: Workers) -> list[BaseProcess]:
    """Return the processes once each has done something; other modules may have children too."""
    pids: set[Any] = set()
    while len(pids) < workers.count:
        pids |= set(workers.map(os.getpid, [()] * 8))
    return [child for child in multiprocessing.active_children() if child.pid in pids]


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def test_a_call_that_hangs_is_killed_and_the_others_are_answered(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    processes = start_all(workers)
    workers.timeout_seconds = LIMIT
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        assert ask(workers, 1, HANGS, 2, 3) == [1, GAVE_UP, 2, 3]
    assert workers.timeouts == 1
    # By SIGTERM, at once: pebble's SIGKILL comes three seconds later.
    (killed,) = (process for process in processes if not process.is_alive())
    assert killed.exitcode == -signal.SIGTERM

    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        assert ask(workers, HANGS, 1, HANGS, 2) == [GAVE_UP, 1, GAVE_UP, 2]
    assert workers.timeouts == 3
    (record,) = caplog.records
    assert "gave up on a response after 0.5 s or a crash (TimeoutError)" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_crash_costs_one_call(workers: Workers) -> None:
    processes = start_all(workers)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(ask(workers, HANGS, HANGS, 1, 2)))
    thread.start()
    time.sleep(0.5)  # both workers hang in their calls
    kill(processes)
    thread.join(30)
    assert found == [GAVE_UP, GAVE_UP, 1, 2]
    assert workers.timeouts == 2


def test_idle_workers_may_be_killed(workers: Workers) -> None:
    kill(start_all(workers))
    assert ask(workers, 1, 2) == [1, 2]
    assert workers.timeouts == 0


def test_workers_that_are_killed_again_and_again_leave_calls_undone(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    processes = start_all(workers)
    workers.prepare = end  # of those that come after
    kill(processes)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        assert ask(workers, 1, 2) == [NOT_CALLED, NOT_CALLED]
        assert ask(workers, 3) == [NOT_CALLED]
    assert (workers.timeouts, workers.not_called) == (0, 3)
    (record,) = caplog.records
    assert "2 of 2 responses are not verified" in record.getMessage()


def test_all_calls_of_a_step_are_bounded(workers: Workers) -> None:
    ask(workers, 1)
    workers.step_seconds = 2 * LIMIT
    start = time.monotonic()
    found = ask(workers, 1, *[HANGS] * 4, 2)
    assert time.monotonic() - start < workers.timeout_seconds / 2
    assert found == [1, *[NOT_CALLED] * 5]
    assert (workers.timeouts, workers.not_called) == (0, 5)
    workers.step_seconds = 300
    assert ask(workers, 1) == [1]  # by new workers


def test_a_result_as_a_score() -> None:
    """A call that was not made does not count as wrong."""
    assert [as_score(found) for found in (True, False, GAVE_UP)] == [1, 0, 0]
    assert math.isnan(as_score(NOT_CALLED))


def test_the_signals_of_a_job_reach_only_our_own_handlers(workers: Workers) -> None:
    caught: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        caught.append(number)

    strangers = children()
    numbers = (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stop = threading.Event()

    def shower() -> None:
        """Signal the workers from their first moment on, and this process for SIGALRM."""
        while not stop.wait(0.02):
            os.kill(os.getpid(), signal.SIGALRM)
            for pid in children() - strangers:
                os.kill(pid, signal.SIGUSR1)
                os.kill(pid, signal.SIGUSR2)

    thread = threading.Thread(target=shower)
    thread.start()
    try:
        assert ask(workers, 1, 2, 3, 4) == [1, 2, 3, 4]
        workers.timeout_seconds = LIMIT
        assert ask(workers, HANGS) == [GAVE_UP]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [signal.getsignal(number) for number in numbers] == [handler] * 3
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        stop.set()
        thread.join()
        for number, old in before.items():
            signal.signal(number, old)
    assert caught.count(signal.SIGALRM) > 10
    assert caught.count(signal.SIGUSR1) == 1


def test_other_threads_may_call_at_the_same_time(workers: Workers) -> None:
    start_all(workers)
    workers.timeout_seconds = LIMIT
    results: dict[int, list[Any]] = {}

    def work(n: int) -> None:
        results[n] = ask(workers, n, HANGS)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n, GAVE_UP] for n in range(2)}
    assert workers.timeouts == 2


def test_copies_have_the_settings_and_no_workers(workers: Workers) -> None:
    processes = start_all(workers)
    for twin in (copy.deepcopy(workers), pickle.loads(pickle.dumps(workers))):
        settings = (twin.count, twin.timeout_seconds, twin.step_seconds, twin.timeouts)
        assert settings == (2, 60, 300, 0)
        twin.close()
        assert all(process.is_alive() for process in processes)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 100_000])
def test_workers_that_cannot_start_are_an_error_and_not_a_hang(workers: Workers, size: int) -> None:
    # The large batch does not fit in the pipe to the workers, so pebble's thread is stuck in it.
    strangers = children()
    workers.prepare = end
    with pytest.raises(RunStoppedError, match="worker processes die before they check anything"):
        ask(workers, *["1" * size] * 8)
    workers.close()
    assert children() <= strangers


SCRIPT = """
import multiprocessing, sys, threading, time
from opd_lightning.verifiers.workers import Workers
from tests.worker_calls import answer, nothing
assert not {"torch", "sympy", "math_verify", "pebble"} & set(sys.modules)

if __name__ == "__main__":
    workers = Workers("Owner", nothing, count=2, timeout_seconds=600, step_seconds=600)
    assert workers.map(answer, [("1",)]) == ["1"]
    calls = [(sys.argv[1],)] * 4
    threading.Thread(target=workers.map, args=(answer, calls), daemon=True).start()
    time.sleep(0.5)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "killed":
        time.sleep(600)
"""


def run(folder: Path, value: str, how: str) -> "subprocess.Popen[str]":
    script = folder / "train.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), value, how],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("value", [HANGS, pytest.param("1", marks=pytest.mark.slow)])
def test_the_program_ends_without_waiting_for_workers(tmp_path: Path, value: str) -> None:
    process = run(tmp_path, value, "ended")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def test_idle_workers_follow_a_killed_program(tmp_path: Path) -> None:
    process = run(tmp_path, "1", "killed")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(pids)
