"""Calls of foreign code, such as a chat template, within limits of time and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock, Timer, current_thread, get_ident, main_thread
from types import FrameType
from typing import TypeVar

from opd_lightning.errors import is_panic, reason_of

TIME_LIMIT = 20.0  # seconds per call; a template may not terminate
MEMORY_LIMIT = 2**31  # bytes that a call may allocate; a template may request any amount

Result = TypeVar("Result")


def bounded(function: Callable[[], Result], *, memory: bool = True) -> Result:
    """Return the result of `function`, which is stopped after `TIME_LIMIT`.

    What is compiled is stopped when it returns, or in the main thread when it looks for signals,
    as Python's arithmetic does.

    The operating system bounds memory for all threads of a process alike. It is therefore bounded
    only in the main thread, where prompts are checked before weights load; another thread may
    call while the main one trains.

    Args:
        function: Untrusted Python code.
        memory: Whether it may allocate `MEMORY_LIMIT` at most. Not for libraries that abort the
            process when memory ends.

    Raises:
        TimeoutError: It takes more time.
        MemoryError: It needs more memory.
        RuntimeError: A Rust library panicked.
    """
    is_main = current_thread() is main_thread()
    try:
        with ExitStack() as limits:
            if memory and is_main:
                limits.enter_context(_memory_limit())
            limits.enter_context(_alarm() if is_main else _timer())
            return function()
    except _Late as late:
        raise TimeoutError(f"it takes more than {TIME_LIMIT:g} s") from late
    except MemoryError as error:
        size = MEMORY_LIMIT / 2**30
        raise MemoryError(f"it needs more than {size:g} GiB of memory") from error
    except BaseException as error:
        if is_panic(error):
            raise RuntimeError(reason_of(error)) from error
        raise


class _Late(BaseException):
    """Raised in a function that is late; Jinja swallows an Exception of a constant expression."""


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise `_Late` in the main thread by a signal; an alarm that is set already is set again."""

    def raise_late(number: int, frame: FrameType | None) -> None:
        raise _Late

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, raise_late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if left:
            passed = time.monotonic() - began
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), interval)


@contextmanager
def _timer() -> Iterator[None]:
    """Raise `_Late` in a thread, to which no signal comes."""
    lock, thread, over = Lock(), get_ident(), False

    def raise_late() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_Late)
                )

    timer = Timer(TIME_LIMIT, raise_late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Let the process allocate `MEMORY_LIMIT` more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # In pages: size, resident, shared, text, library, data.
    pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_LIMIT
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
