"""SIGUSR1 and SIGTERM as wishes: noted when they come, granted between two steps.

SLURM sends them to every process of a job step, at any moment: while libraries are imported, inside
of a collective. So a handler does nothing but note, and whoever listens asks when it suits.

SIGUSR1 is blocked as well, and what is started later inherits that: by default it would kill an
engine's workers, a loader's, a verifier's. SIGTERM is not, for it is how those are ended.
"""

from __future__ import annotations

import os
import signal
from enum import IntEnum
from typing import Any


class Wish(IntEnum):
    """What was asked for; the larger one holds."""

    NONE = 0
    STOP = 1  # SIGTERM
    REQUEUE = 2  # SIGUSR1; the time limit's SIGTERM may follow it, and means no change of mind

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGTERM if self is Wish.STOP else signal.SIGUSR1


class SignalledError(RuntimeError):
    """A signal ended the run in order: every rank has left it at the same point, and it is saved.

    Args:
        code: The exit code of this process.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"a signal ended the run; exit code {code}")
        self.code = code


_came: set[int] = set()
_handlers: dict[int, Any] = {}  # those that ours displaced, while somebody listens
_listener = 0  # process id


def listen() -> None:
    """Note both signals from now on. In the main thread, before others are started."""
    global _listener
    if _handlers:
        return
    _listener = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for number in (signal.SIGUSR1, signal.SIGTERM):
        _handlers[number] = signal.signal(number, _note)


def wish() -> Wish:
    """The strongest one so far."""
    if signal.sigtimedwait({signal.SIGUSR1}, 0):  # what is blocked, the kernel keeps
        _came.add(signal.SIGUSR1)
    if signal.SIGUSR1 in _came:
        return Wish.REQUEUE
    return Wish.STOP if _came else Wish.NONE


def granted() -> None:
    """What came so far is done; what comes from now on is noted anew."""
    wish()
    _came.clear()


def hand_back() -> None:
    """Nobody will grant wishes: signals work as before, and those that came do so now."""
    wish()
    came = set(_came)
    _restore()
    for number in came:
        os.kill(os.getpid(), number)


def close() -> None:
    """The program ends, and whatever comes now is too late."""
    if _handlers:
        wish()
        _handlers[signal.SIGUSR1] = signal.SIG_IGN
        _restore()


def _restore() -> None:
    _came.clear()
    if _handlers:
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _note(number: int, frame: object) -> None:
    if os.getpid() == _listener:
        _came.add(number)
    else:  # a fork, which has nobody that listens
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
