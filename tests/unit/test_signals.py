"""Signals are recorded while they are polled, interrupt before, and reach no children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from opd_lightning.cli import one_line_errors
from opd_lightning.run import signals
from opd_lightning.run.signals import Interrupted, SignalAction, signal_of

USR1, TERM, HUP, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (USR1, TERM, HUP, INT)}
    for number in (TERM, HUP):  # under `nohup` they would be left alone
        signal.signal(number, signal.SIG_DFL)
    signal.signal(INT, signal.default_int_handler)  # shells make background jobs ignore it
    signals.listen()
    signals.defer()
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
        ([HUP], SignalAction.STOP),
        ([USR1], SignalAction.REQUEUE),
        ([USR1, TERM, TERM], SignalAction.REQUEUE),
    ],
    ids=["term", "hup", "usr1", "time limit"],
)
def test_the_larger_action_holds_until_the_end(
    came: list[signal.Signals], action: SignalAction
) -> None:
    signals.listen()  # twice is once
    for number in came:
        signal.raise_signal(number)
    assert [signals.requested(), signals.requested()] == [action, action]
    signals.clear()
    assert signals.requested() is SignalAction.NONE


def test_what_comes_too_late_hurts_nobody() -> None:
    signal.raise_signal(USR1)
    signals.close()
    signal.raise_signal(USR1)


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


def test_what_nobody_will_grant_is_obeyed() -> None:
    """The signal comes while a run starts that has no SlurmRequeue."""
    program = (
        "import os, signal; from opd_lightning.run import signals; signals.listen();"
        f"os.kill(os.getpid(), {int(USR1)}); print('alive', flush=True);"
        "signals.restore(); print('still', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -USR1
    assert done.stdout == "alive\n"


@pytest.mark.parametrize("number", [TERM, HUP])
def test_before_anybody_polls_a_stop_acts_at_once(number: signal.Signals) -> None:
    signals.close()
    signals.interrupt_on_stops()
    signals.listen()
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(number)
    assert signal_of(stop.value) is number
    signal.raise_signal(USR1)
    signal.raise_signal(number)  # the time limit's second signal, while the first is to requeue
    assert signals.requested() is SignalAction.REQUEUE


def test_what_is_ignored_or_handled_stays_so() -> None:
    signals.close()
    handled: list[int] = []
    signal.signal(HUP, signal.SIG_IGN)  # by `nohup`
    signal.signal(TERM, lambda number, _: handled.append(number))
    assert signals.interrupt_on_stops() == {}
    signal.raise_signal(HUP)
    signal.raise_signal(TERM)
    assert handled == [TERM]


def save(*come: signal.Signals) -> Iterator[str]:
    """Yield what happened while these signals came during a save."""
    try:
        with signals.finishing():
            for number in come:
                signal.raise_signal(number)
            yield "saved"
    except KeyboardInterrupt as stop:
        yield signal_of(stop).name


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_save_is_finished_first(number: signal.Signals) -> None:
    signals.close()
    signals.interrupt_on_stops()
    assert list(save(number)) == ["saved", number.name]
    assert list(save(number, number)) == [number.name]  # a second signal acts at once
    assert list(save()) == ["saved"]
    with pytest.raises(KeyboardInterrupt):  # and the handlers are back
        signal.raise_signal(number)


def end_by(number: signal.Signals, *, lightning: bool) -> None:
    with one_line_errors():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if lightning:
                sys.exit(1)
            raise


@pytest.mark.parametrize(
    ("number", "lightning"), [(INT, False), (TERM, False), (HUP, False), (INT, True)]
)
def test_a_program_ends_with_one_line_and_the_code_of_the_signal(
    number: signal.Signals, lightning: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    signals.close()
    signals.interrupt_on_stops()
    with pytest.raises(SystemExit) as end:
        end_by(number, lightning=lightning)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"opd: {number.name}: ended before it was done\n"


def test_a_run_that_said_what_it_saved_says_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Interrupted(TERM)
    stop.is_reported = True  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise stop
    assert end.value.code == 143
    assert capsys.readouterr().err == ""
