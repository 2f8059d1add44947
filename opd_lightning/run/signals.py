"""Signals: SIGTERM and SIGHUP end a program as Ctrl-C does, or are acted on between two steps.

SLURM signals every process of a job step, possibly during a collective. A run with a callback that
saves on signals therefore records them from its first step on, and polls `requested`.

SIGUSR1 is recorded from the start, because it requeues the job. It is also blocked, and child
processes inherit this; its default action would kill workers of engines, data loaders and
verifiers. SIGTERM and SIGHUP are not blocked, because SIGTERM is used to end child processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGHUP)


class SignalAction(IntEnum):
    """Action requested by signals; the larger one has priority."""

    NONE = 0
    STOP = 1  # SIGTERM, SIGHUP
    REQUEUE = 2  # SIGUSR1; takes priority over the SIGTERM that the time limit may send after it

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGTERM if self is SignalAction.STOP else signal.SIGUSR1


class SignalledError(RuntimeError):
    """A signal ended the run cleanly: all ranks stopped at the same point, after saving.

    Args:
        code: Exit code of this process.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"a signal ended the run; exit code {code}")
        self.code = code


class Interrupted(KeyboardInterrupt):
    """A signal ended the program at an arbitrary point, as Ctrl-C does.

    Args:
        number: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """Return the signal behind an exception; SIGINT is Ctrl-C."""
    return interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT


_received: set[int] = set()
_handlers: dict[int, Any] = {}  # displaced handlers
_listener = 0  # id of the process that handles signals
_deferring = False  # stops are recorded instead of raised


def interrupt_on_stops() -> dict[int, Any]:
    """Raise `Interrupted` on SIGTERM and SIGHUP from now on, unless they are ignored or handled.

    Only the main thread can; in another nothing changes. Returns the displaced handlers by signal.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        return {}
    _listener = os.getpid()
    free = [n for n in STOPS if signal.getsignal(n) == signal.SIG_DFL]  # `nohup` ignores SIGHUP
    displaced: dict[int, Any] = {number: signal.signal(number, _stop) for number in free}
    _handlers.update(displaced)
    return displaced


def listen() -> None:
    """Record SIGUSR1 from now on. Call it in the main thread, before other threads start."""
    global _listener
    if signal.SIGUSR1 in _handlers:
        return
    _listener = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    _handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, _record)


def defer() -> None:
    """Record SIGTERM and SIGHUP from now on, for `requested`, instead of raising."""
    global _deferring
    interrupt_on_stops()
    _deferring = True


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


@contextmanager
def finishing() -> Iterator[None]:
    """Delay the first SIGINT, SIGTERM or SIGHUP until the block, such as a save, is done.

    A second one acts at once. Has no effect outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before: dict[int, Any] = {}

    def hold(number: int, frame: Any) -> None:
        came.append((number, frame))
        signal.signal(number, before[number])

    for kind in (signal.SIGINT, *STOPS):
        handler = signal.getsignal(kind)
        if callable(handler):  # the default action cannot be delayed
            before[kind] = handler
            signal.signal(kind, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in came:
        before[number](number, frame)


def restore() -> None:
    """Restore the handler of SIGUSR1, and send it to this process again if it was recorded."""
    if signal.SIGUSR1 in _handlers:
        requested()
        came = signal.SIGUSR1 in _received
        _restore_handlers(signal.SIGUSR1)
        if came:
            os.kill(os.getpid(), signal.SIGUSR1)


def close() -> None:
    """Restore all handlers at the end of the program; ignore SIGUSR1 from now on."""
    global _deferring
    _deferring = False
    if signal.SIGUSR1 in _handlers:
        requested()
        _handlers[signal.SIGUSR1] = signal.SIG_IGN
    _restore_handlers(*_handlers)


def _restore_handlers(*numbers: int) -> None:
    for number in numbers:
        _received.discard(number)
        signal.signal(number, _handlers.pop(number))
        if number == signal.SIGUSR1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _record(number: int, frame: object) -> None:
    if os.getpid() == _listener:
        _received.add(number)
    else:
        _default(number)


def _stop(number: int, frame: object) -> None:
    if os.getpid() != _listener:
        _default(number)
    elif _deferring or requested() is SignalAction.REQUEUE:  # `requested` ends the job in order
        _received.add(number)
    else:
        raise Interrupted(signal.Signals(number))


def _default(number: int) -> None:
    """Apply the default action in a forked process, which does not poll `requested`."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
