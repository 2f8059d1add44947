"""Signals are noted, not obeyed, while somebody listens, and by nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from opd_lightning.run import signals
from opd_lightning.run.signals import SignalAction

USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (USR1, TERM)}
    signals.listen()
    yield
    signals.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_came() -> None:
    assert signals.requested() is SignalAction.NONE


@pytest.mark.parametrize(
    ("came", "action"),
    [
        ([TERM], SignalAction.STOP),
        ([USR1], SignalAction.REQUEUE),
        ([USR1, TERM, TERM], SignalAction.REQUEUE),
    ],
    ids=["term", "usr1", "time limit"],
)
def test_the_larger_action_holds_until_the_end(
    came: list[signal.Signals], action: SignalAction
) -> None:
    signals.listen()  # twice is once
    for number in came:
        os.kill(os.getpid(), number)
    assert [signals.requested(), signals.requested()] == [action, action]
    signals.clear()
    assert signals.requested() is SignalAction.NONE


def test_what_comes_too_late_hurts_nobody() -> None:
    os.kill(os.getpid(), USR1)
    signals.close()
    os.kill(os.getpid(), USR1)


def test_a_program_that_is_started_is_deaf_to_usr1_alone() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.read(1)
    child.send_signal(USR1)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    child.terminate()
    assert child.wait(5) == -TERM


def test_a_fork_listens_to_nothing() -> None:
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begun, b"!")
        time.sleep(10)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, USR1)
    os.kill(child, TERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -TERM


@pytest.mark.parametrize("number", [USR1, TERM])
def test_what_nobody_will_grant_is_obeyed(number: signal.Signals) -> None:
    """The signal comes while a run starts that has no SlurmRequeue."""
    program = (
        "import os, signal; from opd_lightning.run import signals; signals.listen();"
        f"os.kill(os.getpid(), {int(number)}); print('alive', flush=True);"
        "signals.restore(); print('still', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -number
    assert done.stdout == "alive\n"
