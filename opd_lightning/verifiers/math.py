"""Mathematical equality, checked by math-verify in worker processes that can be killed."""

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
    # Not at run time: the workers import this module, and need neither torch nor its memory.
    from pebble import ProcessPool

    from opd_lightning.types import Prompt

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# SLURM signals every process of a job step; by default these two would kill a worker.
JOB_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2}
# A pool dies when a worker is killed from outside while idle; a second death is a broken set-up.
MAX_POOLS = 2


class MathVerifier(Verifier):
    """Scores 1 where the response's final answer equals the prompt's mathematically, else 0.

    Args:
        max_workers: Worker processes that check answers side by side.
        timeout_seconds: Most seconds spent on one response. A response that needs more scores 0
            and its worker is killed.

    `timeouts` counts the responses given up on, because they took too long or crashed a worker.

    math-verify's own time limits need SIGALRM and the main thread; ours need neither, so this
    works in any thread and leaves the handlers of SLURM and Lightning alone. The workers start
    on the first `verify`. A copy or a pickle of a verifier has its settings and no workers.
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
        self._program_ends = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.max_workers, self.timeout_seconds)

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """1.0 for each response that is right, else 0.0."""
        pairs = zip(prompts, responses, strict=True)
        items = [(prompt.answer or "", text) for prompt, text in pairs]
        return [float(right or False) for right in self._ask(is_right, items)]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """The final answers as expressions; those that are equal only after algebra differ."""
        return self._ask(final_answer, [(text,) for text in responses])

    def _ask(
        self, question: Callable[..., Result], items: Sequence[tuple[str, ...]]
    ) -> list[Result | None]:
        """A worker's answer to each item; None for one that took too long or crashed it."""
        waiting = dict(enumerate(items))
        found: dict[int, Result | None] = {}
        with self._lock:
            for _ in range(MAX_POOLS):
                done = self._run(question, waiting)
                found |= done
                waiting = {i: item for i, item in waiting.items() if i not in done}
                if not waiting:
                    return [found[i] for i in range(len(items))]
                if self._program_ends:
                    # This is a daemon thread that outlived the rest, and new workers would be
                    # orphans. Of all exceptions only this one ends a thread without a traceback.
                    raise SystemExit
        raise RuntimeError(
            "MathVerifier: the worker processes die before they check anything; their standard "
            "error says why"
        )

    def close(self) -> None:
        """Stop the workers; the next `verify` starts new ones."""
        if self._pool is not None:
            atexit.unregister(self._close_for_good)
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def _close_for_good(self) -> None:
        self._program_ends = True
        self.close()

    def _run(
        self, question: Callable[..., Result], items: dict[int, tuple[str, ...]]
    ) -> dict[int, Result | None]:
        """Answers to the items that were settled before the pool, if ever, broke."""
        pool = self._running_pool()
        futures: dict[int, Future[Result]] = {
            index: pool.schedule(question, args=item, timeout=self.timeout_seconds)
            for index, item in items.items()
        }
        # Futures that a broken pool had not yet sent to a worker never finish, hence the look
        # at the pool itself.
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
            # pebble, too, ends its workers at exit, but can start new ones while it does so.
            # Handlers run last in first out, so ours stops the whole pool before that.
            atexit.register(self._close_for_good)
        return self._pool


def start_pool(max_workers: int) -> ProcessPool:
    """A running pool whose workers are deaf to SLURM's signals from their first moment."""
    from pebble import ProcessPool

    pool = ProcessPool(
        max_workers=max_workers, initializer=prepare_worker, context=get_context("spawn")
    )
    # Threads and processes inherit the mask of the thread that starts them, so it also covers
    # workers that pebble's threads start later, and their start-up, before any Python runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        if not pool.active:  # asking is what starts it
            raise RuntimeError("MathVerifier: the worker pool did not start")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def prepare_worker() -> None:
    """Make a worker killable and warm, before its first task's clock runs."""
    # pebble's Python handler cannot run while C code hangs: the kill would take 3 s longer and
    # hold up the other workers.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # math-verify warns that its time limits are off, which is the point.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Much is imported and compiled only when a first answer is checked.
    is_right("1", r"\boxed{1}")


def is_right(answer: str, response: str) -> bool:
    """Whether the final answer in the response equals the reference; runs in a worker."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    found = parse(response, parsing_timeout=None)
    return bool(verify(gold, found, timeout_seconds=None))


def final_answer(response: str) -> str | None:
    """The final answer in the response, as sympy writes it; runs in a worker."""
    from math_verify import parse

    found = parse(response, parsing_timeout=None)
    return str(found[0]) if found else None


def _rebuild(kind: type[MathVerifier], max_workers: int, timeout_seconds: float) -> MathVerifier:
    return kind(max_workers=max_workers, timeout_seconds=timeout_seconds)
