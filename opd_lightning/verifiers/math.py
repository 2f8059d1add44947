"""Mathematical equality of answers, checked by math-verify in worker processes."""

from __future__ import annotations

import atexit
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    # Not at run time: the workers import this module and need neither torch nor its memory.
    from pebble import ProcessPool

    from opd_lightning.types import Prompt

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# SLURM signals every process of a job step; the default action of these two kills a worker.
JOB_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2}
# A pool breaks if a worker is killed from outside while idle; twice means a broken set-up.
MAX_POOLS = 2


class MathVerifier(Verifier):
    """Verifier that scores 1 if the final answer equals the prompt's mathematically, else 0.

    Args:
        max_workers: Number of worker processes that check answers in parallel.
        timeout_seconds: Time limit for one response. A response that takes longer scores 0 and
            its worker is killed.

    `timeouts` counts the responses that took too long or crashed a worker.

    The time limits do not use SIGALRM, as those of math-verify do, so the verifier works in any
    thread and does not replace signal handlers of SLURM and Lightning. The workers start on the
    first `verify`. A copy or pickle of a verifier keeps its settings but has no workers.
    """

    def __init__(self, *, max_workers: int = 2, timeout_seconds: float = 5.0) -> None:
        if max_workers < 1:
            raise UserError(f"MathVerifier: 'max_workers' must be at least 1, got {max_workers}")
        if timeout_seconds <= 0:
            raise UserError(
                f"MathVerifier: 'timeout_seconds' must be above 0, got {timeout_seconds}"
            )
        self.max_workers = max_workers
        self.timeout_seconds = timeout_seconds
        self.timeouts = 0
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()
        self._exiting = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.max_workers, self.timeout_seconds)

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return 1.0 for each response with a correct answer, else 0.0."""
        pairs = zip(prompts, responses, strict=True)
        items = [(prompt.answer or "", text) for prompt, text in pairs]
        return [float(right or False) for right in self._map(is_right, items)]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """Return final answers as expressions; those equal only after algebra differ."""
        return self._map(final_answer, [(text,) for text in responses])

    def _map(
        self, function: Callable[..., Result], items: Sequence[tuple[str, ...]]
    ) -> list[Result | None]:
        """Call `function` on each item in a worker; None where it took too long or crashed."""
        waiting = dict(enumerate(items))
        found: dict[int, Result | None] = {}
        with self._lock:
            for _ in range(MAX_POOLS):
                done = self._run(function, waiting)
                found |= done
                waiting = {i: item for i, item in waiting.items() if i not in done}
                if not waiting:
                    return [found[i] for i in range(len(items))]
                if self._exiting:
                    # This is a daemon thread at interpreter exit; new workers would be orphans.
                    # SystemExit is the only exception that ends a thread without a traceback.
                    raise SystemExit
        raise RuntimeError(
            "MathVerifier: the worker processes die before they check anything; their standard "
            "error says why"
        )

    def close(self) -> None:
        """Stop the workers; the next `verify` starts new ones."""
        if self._pool is not None:
            atexit.unregister(self._close_at_exit)
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def _close_at_exit(self) -> None:
        self._exiting = True
        self.close()

    def _run(
        self, function: Callable[..., Result], items: dict[int, tuple[str, ...]]
    ) -> dict[int, Result | None]:
        """Return results by index, without those of items that a broken pool did not finish."""
        pool = self._running_pool()
        futures: dict[int, Future[Result]] = {
            index: pool.schedule(function, args=item, timeout=self.timeout_seconds)
            for index, item in items.items()
        }
        # Futures that a broken pool had not yet sent to a worker never finish, so the pool is
        # checked as well.
        while wait(futures.values(), timeout=1.0).not_done and pool.active:
            pass
        return {
            index: self._result(future)
            for index, future in futures.items()
            if future.done() and not isinstance(future.exception(), BrokenProcessPool)
        }

    def _result(self, future: Future[Result]) -> Result | None:
        error = future.exception()
        if error is None:
            return future.result()
        self.timeouts += 1
        if self.timeouts == 1:
            log.warning(
                "MathVerifier: gave up on a response after %.1f s or a crash (%s); it scores 0, "
                "and further ones are only counted",
                self.timeout_seconds,
                type(error).__name__,
            )
        return None

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self._pool = start_pool(self.max_workers)
            # pebble also ends its workers at exit, but may start new ones while it does so.
            # Handlers run last in, first out, so this one stops the pool before pebble's runs.
            atexit.register(self._close_at_exit)
        return self._pool


def start_pool(max_workers: int) -> ProcessPool:
    """Start a pool whose workers block SLURM's signals from their start."""
    from pebble import ProcessPool

    pool = ProcessPool(
        max_workers=max_workers, initializer=prepare_worker, context=get_context("spawn")
    )
    # Threads and processes inherit the mask of the thread that starts them. It thus also covers
    # workers that pebble's threads start later, and their start-up before any Python code.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        if not pool.active:  # reading the property starts the pool
            raise RuntimeError("MathVerifier: the worker pool did not start")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def prepare_worker() -> None:
    """Restore SIGTERM and warm up a worker before the time limit of its first task starts."""
    # pebble's Python handler cannot run while C code hangs: the kill would take 3 s longer and
    # delay the other workers.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # math-verify warns that its time limits are off, which is intended.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Many imports and compilations happen only at the first check of an answer.
    is_right("1", r"\boxed{1}")


def is_right(answer: str, response: str) -> bool:
    """Return whether the final answer in the response equals the reference; runs in a worker."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    found = parse(response, parsing_timeout=None)
    return bool(verify(gold, found, timeout_seconds=None))


def final_answer(response: str) -> str | None:
    """Return the final answer in the response, as sympy prints it; runs in a worker."""
    from math_verify import parse

    found = parse(response, parsing_timeout=None)
    return str(found[0]) if found else None


def _rebuild(kind: type[MathVerifier], max_workers: int, timeout_seconds: float) -> MathVerifier:
    return kind(max_workers=max_workers, timeout_seconds=timeout_seconds)
