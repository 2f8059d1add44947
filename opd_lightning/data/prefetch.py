"""Prefetch of the next step's rollouts in a thread while the current step trains."""

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
    written: Future[tuple[list[Rollout], float]]  # rollouts and the seconds that they took


class RolloutPrefetch:
    """Prefetch of at most one step's rollouts, pending or finished.

    Only the thread may use the engines until `wait` returns. `take` raises an exception of the
    thread unchanged.

    Args:
        hangs: Returns whether the thread is known never to return.
    """

    def __init__(self, hangs: Callable[[], bool] = lambda: False) -> None:
        self._hangs = hangs
        self._executor: ThreadPoolExecutor | None = None
        self._job: _Job | None = None
        self._waited = 0.0  # seconds that the trainer was blocked on the job

    def start(self, step: int, write: Callable[[], list[Rollout]]) -> None:
        """Start to write the rollouts of `step`. The engines must be prepared."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        # The current GPU is set per thread.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._job = _Job(step, self._executor.submit(_timed, write, device))
        self._waited = 0.0

    def restore(self, step: int, rollouts: list[Rollout]) -> None:
        """Accept the rollouts of `step` from a checkpoint as finished."""
        done: Future[tuple[list[Rollout], float]] = Future()
        done.set_result((rollouts, 0.0))
        self._job = _Job(step, done)

    def take(self, step: int, timer: StepTimer) -> list[Rollout] | None:
        """Return the rollouts of `step` and remove them; None if they were not started.

        The wait is added to `timer` as "generate", the overlapped time as "generate_hidden".
        """
        job = self._job
        if job is None or job.step != step:
            return None
        with timer.stage("generate"):
            self._wait(job)
        rollouts, seconds = job.written.result()
        self._job = None  # only here, so that an interrupted wait loses nothing
        timer.add("generate_hidden", max(0.0, seconds - self._waited))
        return rollouts

    def peek(self, step: int, timer: StepTimer) -> list[Rollout] | None:
        """Return the rollouts of `step` without removing them; None if missing or never done."""
        job = self._job
        if job is None or job.step != step or (self._hangs() and not job.written.done()):
            return None
        with timer.stage("generate"):
            self._wait(job)
        return None if job.written.exception() else job.written.result()[0]

    def discard(self) -> None:
        """Discard the prefetched rollouts; the weights that wrote them were rolled back."""
        self.wait()
        self._job = None

    def wait(self) -> None:
        """Wait until the thread no longer uses an engine."""
        if self._job is not None:
            self._wait(self._job)

    def close(self) -> None:
        """Shut the thread down; finished rollouts can still be taken."""
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


# Fields that follow from a rollout's position in the prompt order.
_DERIVED = ("prompt", "prompt_ids")


def to_plain(rollouts: Iterable[Rollout]) -> list[dict[str, Any]]:
    """Convert rollouts, without their prompts, to dicts of numbers, strings, lists and dicts."""
    names = [f.name for f in fields(Rollout) if f.name not in _DERIVED]
    plain = [{name: getattr(rollout, name) for name in names} for rollout in rollouts]
    for row in plain:
        row |= {"stop_reason": row["stop_reason"].value, "author": row["author"].value}
        row["views"] = dict(row["views"])
    return plain


def from_plain(
    plain: Iterable[dict[str, Any]], prompt_at: Callable[[int], tuple[Prompt, list[int]]]
) -> list[Rollout]:
    """Rebuild rollouts; `prompt_at` maps a position of the order to a prompt and its ids."""
    rollouts = []
    for row in plain:
        prompt, prompt_ids = prompt_at(row["group"])
        enums = {"stop_reason": StopReason(row["stop_reason"]), "author": Author(row["author"])}
        rollouts.append(Rollout(prompt=prompt, prompt_ids=prompt_ids, **{**row, **enums}))
    return rollouts
