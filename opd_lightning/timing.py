"""Where the time of an optimiser step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

# Stages that any trainer must spend; the rest of a step is overhead.
USEFUL = frozenset({"generate", "student", "teacher", "backward", "optimizer"})


class StepTimer:
    """Seconds per stage and for the whole step, on the host's clock.

    On a GPU, kernels run behind the host: work a stage has queued is paid for by the next stage
    that waits (generate, the optimiser's clipping). Sums are right, borders are soft.
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
        """Seconds of a stage that somebody else measured, such as work beside the step."""
        self._stages[name] += seconds

    def pause(self) -> None:
        """Until `resume`, nothing counts: validation happens between steps, not in them."""
        self._paused = perf_counter(), dict(self._stages)

    def resume(self) -> None:
        assert self._paused is not None
        since, stages = self._paused
        self._stages = defaultdict(float, stages)
        if self._step_began is not None:
            self._step_began += perf_counter() - since
        self._paused = None

    def next_step(self) -> None:
        """Close the running step into `last` and begin another.

        `last` has seconds per stage, "step" for the whole and "overhead", the fraction of it
        spent outside generation, forward passes, backward and optimiser.
        """
        now = perf_counter()
        if self._step_began is not None:
            whole = now - self._step_began
            useful = sum(s for stage, s in self._stages.items() if stage in USEFUL)
            self.last = {**self._stages, "step": whole, "overhead": 1 - useful / whole}
        self._stages.clear()
        self._step_began = now

    def figures(self, tokens: float) -> dict[str, float]:
        """The last whole step's times, as they are logged; none before there is one.

        Args:
            tokens: Response tokens of that step.
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
