"""The next step's rollouts, written in a thread while this step trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields
from time import perf_counter
from typing import Any, NamedTuple

import torch

from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Prompt, Rollout, StopReason


class _Job(NamedTuple):
    step: int
    written: Future[tuple[list[Rollout], float]]  # and the seconds it took


class RolloutsAhead:
    """At most one step's rollouts, in the making or ready.

    The engine is the thread's until `wait` returns. What the thread raised is raised by `take`,
    as itself.

    Args:
        hangs: Whether the thread is known never to come back.
    """

    def __init__(self, hangs: Callable[[], bool] = lambda: False) -> None:
        self._hangs = hangs
        self._executor: ThreadPoolExecutor | None = None
        self._job: _Job | None = None
        self._waited = 0.0  # seconds that the trainer stood still for the job

    def start(self, step: int, write: Callable[[], list[Rollout]]) -> None:
        """Write the rollouts of `step` from now on, with engines that are ready."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        # The current GPU is a thread's own.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._job = _Job(step, self._executor.submit(_timed, write, device))
        self._waited = 0.0

    def restore(self, step: int, rollouts: list[Rollout]) -> None:
        """Take over what an interrupted run had written for `step`."""
        done: Future[tuple[list[Rollout], float]] = Future()
        done.set_result((rollouts, 0.0))
        self._job = _Job(step, done)

    def take(self, step: int, timer: StepTimer) -> list[Rollout] | None:
        """The rollouts of `step`, once; None if nobody began them.

        `timer` is charged for the wait as "generate" and told of the rest as "generate_hidden".
        """
        job = self._job
        if job is None or job.step != step:
            return None
        with timer.stage("generate"):
            self._wait(job)
        rollouts, seconds = job.written.result()
        self._job = None  # not before: an interrupted wait loses nothing
        timer.add("generate_hidden", max(0.0, seconds - self._waited))
        return rollouts

    def look(self, step: int, timer: StepTimer) -> list[Rollout] | None:
        """The rollouts of `step`, still to be taken; None if there are none, or never will be."""
        job = self._job
        if job is None or job.step != step or (self._hangs() and not job.written.done()):
            return None
        with timer.stage("generate"):
            self._wait(job)
        return None if job.written.exception() else job.written.result()[0]

    def drop(self) -> None:
        """Forget them: the weights that wrote them are nobody's any more."""
        self.wait()
        self._job = None

    def wait(self) -> None:
        """Return when no engine is used any more."""
        if self._job is not None:
            self._wait(self._job)

    def close(self) -> None:
        """End the thread; what it wrote can still be taken."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _wait(self, job: _Job) -> None:
        began = perf_counter()
        wait([job.written])
        self._waited += perf_counter() - began


def _timed(write: Callable[[], list[Rollout]], device: int | None) -> tuple[list[Rollout], float]:
    if device is not None:
        torch.cuda.set_device(device)
    began = perf_counter()
    rollouts = write()
    return rollouts, perf_counter() - began


# What a rollout's position in the run's order says already.
_KNOWN = ("prompt", "prompt_ids")


def to_plain(rollouts: Iterable[Rollout]) -> list[dict[str, Any]]:
    """Every field but the prompt, in numbers, strings, lists and dicts."""
    names = [f.name for f in fields(Rollout) if f.name not in _KNOWN]
    plain = [{name: getattr(rollout, name) for name in names} for rollout in rollouts]
    for row in plain:
        row |= {"stop_reason": row["stop_reason"].value, "author": row["author"].value}
        row["views"] = dict(row["views"])
    return plain


def from_plain(
    plain: Iterable[dict[str, Any]], prompt_at: Callable[[int], tuple[Prompt, list[int]]]
) -> list[Rollout]:
    """The rollouts again; `prompt_at` knows the prompt and its ids at a position of the order."""
    rollouts = []
    for row in plain:
        prompt, prompt_ids = prompt_at(row["group"])
        enums = {"stop_reason": StopReason(row["stop_reason"]), "author": Author(row["author"])}
        rollouts.append(Rollout(prompt=prompt, prompt_ids=prompt_ids, **{**row, **enums}))
    return rollouts
