"""Record SIGUSR1 and SIGTERM and act on them between optimiser steps.

SLURM sends them to every process of a job step at any time, during imports or inside a collective.
So the handler only records the signal, and the training loop polls `requested`.

SIGUSR1 is blocked as well, and child processes inherit that: its default action would kill workers
of engines, data loaders and verifiers. SIGTERM is not blocked, because it is used to end them.
"""

from __future__ import annotations

import os
import signal
from enum import IntEnum
from typing import Any


class SignalAction(IntEnum):
    """Action requested by signals; the larger one has priority."""

    NONE = 0
    STOP = 1  # SIGTERM
    REQUEUE = 2  # SIGUSR1; takes priority over the SIGTERM that the time limit may send after it

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGTERM if self is SignalAction.STOP else signal.SIGUSR1


class SignalledError(RuntimeError):
    """A signal ended the run in order: all ranks stopped at the same point, and it is saved.

    Args:
        code: Exit code of this process.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"a signal ended the run; exit code {code}")
        self.code = code


_received: set[int] = set()
_handlers: dict[int, Any] = {}  # displaced handlers, while signals are recorded
_recorder = 0  # id of the process that records


def listen() -> None:
    """Record both signals from now on. Call it in the main thread, before other threads start."""
    global _recorder
    if _handlers:
        return
    _recorder = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for number in (signal.SIGUSR1, signal.SIGTERM):
        _handlers[number] = signal.signal(number, _record)


def requested() -> SignalAction:
    """Return the action of highest priority that was requested so far."""
    if signal.sigtimedwait({signal.SIGUSR1}, 0):  # the kernel keeps a blocked signal pending
        _received.add(signal.SIGUSR1)
    if signal.SIGUSR1 in _received:
        return SignalAction.REQUEUE
    return SignalAction.STOP if _received else SignalAction.NONE


def clear() -> None:
    """Discard the recorded signals; later ones are recorded again."""
    requested()
    _received.clear()


def restore() -> None:
    """Restore the previous handlers, and send the recorded signals to this process again."""
    requested()
    received = set(_received)
    _restore_handlers()
    for number in received:
        os.kill(os.getpid(), number)


def close() -> None:
    """Restore the previous handlers at the end of the program; ignore SIGUSR1 from now on."""
    if _handlers:
        requested()
        _handlers[signal.SIGUSR1] = signal.SIG_IGN
        _restore_handlers()


def _restore_handlers() -> None:
    _received.clear()
    if _handlers:
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _record(number: int, frame: object) -> None:
    if os.getpid() == _recorder:
        _received.add(number)
    else:  # a forked process, which does not poll
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
