"""Worker processes that call functions under time limits."""

from __future__ import annotations

import atexit
import logging
import math
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from functools import partial
from multiprocessing import get_context
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.verifiers.base import check_time_limits

if TYPE_CHECKING:
    from pebble import ProcessPool

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# SLURM signals every process of a job step; the default action of the first two kills a worker.
# A terminal sends Ctrl-C to all processes; only the trainer handles it.
JOB_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}
# A pool breaks if an idle worker is killed from outside. Maximum number of consecutive pools that
# finish nothing.
MAX_POOLS = 2


class Unfinished(Enum):
    """Reason why a call has no result."""

    GAVE_UP = "its time limit passed, or it crashed its worker"
    NOT_CALLED = "the time of all calls passed, or no worker could be started"


def as_score(result: float | Unfinished) -> float:
    """Return the score of a response: 0 if it took too long, NaN if it was not checked."""
    if isinstance(result, Unfinished):
        return math.nan if result is Unfinished.NOT_CALLED else 0.0
    return float(result)


class Workers:
    """Worker processes that call functions on items in parallel, each under a time limit.

    `timeouts` counts the calls that took too long or crashed a worker, `not_called` those that no
    worker began or finished within `step_seconds`. The first of each kind is logged as a warning.

    The limits do not use SIGALRM, so calls work in any thread and no signal handler of SLURM or
    Lightning is replaced. The workers start on the first call. A copy or pickle keeps the settings
    but has no workers.

    Args:
        owner: Name in messages.
        prepare: Called in every worker before its first item, outside of the time limit.
        count: Number of processes.
        timeout_seconds: Time limit of one item. Its worker is killed then.
        step_seconds: Time limit of all items of one `map`.
    """

    def __init__(
        self,
        owner: str,
        prepare: Callable[[], None],
        *,
        count: int,
        timeout_seconds: float,
        step_seconds: float,
    ) -> None:
        if count < 1:
            raise UserError(f"{owner}: 'max_workers' must be at least 1, got {count}")
        check_time_limits(owner, timeout_seconds=timeout_seconds, step_seconds=step_seconds)
        self.owner = owner
        self.prepare = prepare
        self.count = count
        self.timeout_seconds = timeout_seconds
        self.step_seconds = step_seconds
        self.timeouts = 0
        self.not_called = 0
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()
        self._exiting = False
        self._has_worked = False

    def __reduce__(self) -> tuple[Any, ...]:
        made = partial(
            type(self),
            self.owner,
            self.prepare,
            count=self.count,
            timeout_seconds=self.timeout_seconds,
            step_seconds=self.step_seconds,
        )
        return made, ()

    def map(
        self, function: Callable[..., Result], items: Sequence[tuple[Any, ...]]
    ) -> list[Result | Unfinished]:
        """Return `function(*item)` of each item, or the reason for a missing result.

        Raises:
            RunStoppedError: If no worker has ever finished a call, so the set-up is broken.
        """
        waiting = dict(enumerate(items))
        found: dict[int, Result | Unfinished] = {}
        with self._lock:
            end = monotonic() + self.step_seconds
            broken = 0  # consecutive pools that finished nothing
            while waiting and broken < MAX_POOLS and monotonic() < end:
                done = self._run(function, waiting, end)
                found |= done
                waiting = {i: item for i, item in waiting.items() if i not in done}
                broken = 0 if done else broken + 1
                self._has_worked |= bool(done)
                if waiting and self._exiting:
                    # This is a daemon thread at interpreter exit; new workers would be orphans.
                    # SystemExit is the only exception that ends a thread without a traceback.
                    raise SystemExit
            if waiting:
                self._note_not_called(len(waiting), len(items), in_time=monotonic() < end)
        return [found.get(i, Unfinished.NOT_CALLED) for i in range(len(items))]

    def close(self) -> None:
        """Stop the workers; the next `map` starts new ones."""
        if self._pool is not None:
            atexit.unregister(self._close_at_exit)
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def _close_at_exit(self) -> None:
        self._exiting = True
        self.close()

    def _run(
        self, function: Callable[..., Result], items: dict[int, tuple[Any, ...]], end: float
    ) -> dict[int, Result | Unfinished]:
        """Return results by index; items that a pool did not finish or begin in time are absent."""
        pool = self._running_pool()
        futures: dict[int, Future[Result]] = {
            index: pool.schedule(function, args=item, timeout=self.timeout_seconds)
            for index, item in items.items()
        }
        # Futures that a broken pool had not yet sent to a worker never finish, so the pool is
        # checked as well.
        while True:
            left = end - monotonic()
            if not wait(futures.values(), timeout=max(0.0, min(1.0, left))).not_done:
                break
            if left <= 0:
                self.close()  # ends running calls
                break
            if not pool.active:
                break
        return {
            index: self._result(future)
            for index, future in futures.items()
            if future.done()
            and not future.cancelled()
            and not isinstance(future.exception(), BrokenProcessPool | CancelledError)
        }

    def _result(self, future: Future[Any]) -> Any:
        """Return the result of a finished call; count and warn of one that was given up."""
        error = future.exception()
        if error is None:
            return future.result()
        self.timeouts += 1
        if self.timeouts == 1:
            log.warning(
                "%s: gave up on a response after %.1f s or a crash (%s); it scores 0, "
                "and further ones are only counted",
                self.owner,
                self.timeout_seconds,
                type(error).__name__,
            )
        return Unfinished.GAVE_UP

    def _note_not_called(self, missing: int, of: int, *, in_time: bool) -> None:
        died = "the worker processes die before they check anything; their standard error says why"
        if in_time and not self._has_worked:
            raise RunStoppedError(f"{self.owner}: {died}")
        self.not_called += missing
        if self.not_called > missing:
            return
        log.warning(
            "%s: %d of %d responses are not verified, because %s; they have no reward, and "
            "further ones are counted as response/unverified",
            self.owner,
            missing,
            of,
            died if in_time else f"{self.step_seconds:g} s (step_seconds) have passed",
        )

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self._pool = start_pool(self.count, self.prepare)
            # pebble also ends its workers at exit, but may start new ones while it does so.
            # Handlers run last in, first out, so this one stops the pool before pebble's runs.
            atexit.register(self._close_at_exit)
        return self._pool


def start_pool(count: int, prepare: Callable[[], None]) -> ProcessPool:
    """Start a pool of workers that block SLURM's signals from their start."""
    from pebble import ProcessPool

    pool = ProcessPool(
        max_workers=count,
        initializer=_prepare_worker,
        initargs=(prepare,),
        context=get_context("spawn"),
    )
    # Threads and processes inherit the mask of the thread that starts them. It thus also covers
    # workers that pebble's threads start later, and their start-up before any Python code.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        if not pool.active:  # reading the property starts the pool
            raise RuntimeError("verifiers: the worker pool did not start")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _prepare_worker(prepare: Callable[[], None]) -> None:
    # pebble's Python handler cannot run while C code hangs: the kill would take 3 s longer and
    # delay the other workers.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prepare()
