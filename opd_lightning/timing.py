"""Durations of the stages of an optimiser step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

# Stages that every trainer needs; the remainder of a step is overhead.
USEFUL = frozenset({"generate", "student", "teacher", "backward", "optimizer"})


class StepTimer:
    """Timer of the stages of an optimiser step, in seconds on the host's clock.

    On a GPU, kernels run asynchronously: work that a stage queues counts for the next stage that
    waits (generate, the optimiser's clipping). Sums are exact, boundaries of stages are not.
    """

    def __init__(self) -> None:
        self._stages: defaultdict[str, float] = defaultdict(float)
        self._open: dict[str, float] = {}
        self._step_began: float | None = None
        self._paused: tuple[float, dict[str, float]] | None = None
        self.last: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str) -> None:
        self._open[name] = perf_counter()

    def stop(self, name: str) -> None:
        self._stages[name] += perf_counter() - self._open.pop(name)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere, such as work in parallel to the step, to a stage."""
        self._stages[name] += seconds

    def pause(self) -> None:
        """Stop counting until `resume`, as for validation, which is not part of a step."""
        self._paused = perf_counter(), dict(self._stages)

    def resume(self) -> None:
        assert self._paused is not None
        since, stages = self._paused
        self._stages = defaultdict(float, stages)
        if self._step_began is not None:
            self._step_began += perf_counter() - since
        self._paused = None

    def next_step(self) -> None:
        """End the current step, store its times in `last` and begin the next.

        `last` has the seconds of each stage and of the whole "step", and "overhead", the fraction
        of the step spent outside generation, forward passes, backward and optimiser.
        """
        now = perf_counter()
        if self._step_began is not None:
            whole = now - self._step_began
            useful = sum(s for stage, s in self._stages.items() if stage in USEFUL)
            self.last = {**self._stages, "step": whole, "overhead": 1 - useful / whole}
        self._stages.clear()
        self._step_began = now

    def figures(self, tokens: float) -> dict[str, float]:
        """Return the times of the last complete step by logged name; empty before the first.

        Args:
            tokens: Response tokens of that step; without any the result is empty.
        """
        times = dict(self.last)
        if not times or not tokens:
            return {}
        overhead = times.pop("overhead")
        return {
            "tokens_per_second": tokens / times["step"],
            "time/overhead": overhead,
            **{f"time/{stage}_seconds": seconds for stage, seconds in times.items()},
            **{f"cost/{stage}_us_per_token": 1e6 * s / tokens for stage, s in times.items()},
        }
