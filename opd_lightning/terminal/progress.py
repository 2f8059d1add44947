"""Progress of a long stage: a bar on a terminal, a line from time to time in a log."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from opd_lightning.terminal.progress_bar import Bar

PAUSE = 10.0  # seconds between two lines of a log
LONG = 5.0  # seconds before the bar of a stage within another is shown
LONG_IN_LOGS = 60.0  # seconds before its first line in a log, and between two
REDRAW = 0.1  # seconds between two updates of a bar on the screen
RECENT = 100  # updates that the rate and the time left are measured over

T = TypeVar("T")


def is_watched() -> bool:
    """Return whether stderr is a terminal and not the log of a SLURM job step."""
    return sys.stderr.isatty() and "SLURM_STEP_ID" not in os.environ


def _is_first() -> bool:
    """Return whether this is the first rank of a run, the only one that shows progress."""
    dist = sys.modules.get("torch.distributed")  # not imported for this alone
    return dist is None or not dist.is_initialized() or dist.get_rank() == 0


def say(line: str) -> None:
    """Write a line to stderr, above the bars."""
    if is_watched():
        from opd_lightning.terminal.progress_bar import Bar

        Bar.write(line, file=sys.stderr)
    else:
        sys.stderr.write(f"{line}\n")  # in one call: several threads may write
        sys.stderr.flush()


class Progress:
    """Progress of a stage on stderr: units done, rate and time left.

    Example of a line in a log: "generate 512/4,096 responses, 38.1 responses/s, 01:34 left".
    Rate and time left are measured over the last `RECENT` updates, from the end of the first one,
    which contains the start-up (engines start, kernels compile). They are "?" until the second
    update. At the end the rate is that of the whole stage.

    Only the first rank shows progress. Each thread may have its stages; one thread may update
    a stage while another closes it.

    Args:
        label: Name of the stage.
        total: Number of units to do, at most; None if it is not known.
        unit: Name of a unit, in the singular.
        done: Number of units done before.
        every: Least number of units between two lines of a log, which are at least `PAUSE` apart.
        within: Whether this is part of another stage or step: shown only after `LONG` seconds, and
            removed at its end.
        disable: Show nothing.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        every: int = 1,
        within: bool = False,
        disable: bool = False,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.units = unit + ("es" if unit.endswith("ch") else "s")
        self.within = within
        self.figures = ""  # shown beside the amount, such as "loss 0.3"
        self.done = self._reported = self._before = done
        self._every = every
        self._began = monotonic()
        # (time, done) at the end of each recent update.
        self._updates: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)
        self._bar: Bar | None = None
        self._lock = threading.Lock()  # guards the displayed state
        self._in_lines = not is_watched()
        self._pause = REDRAW
        first = LONG if within else 0.0
        if self._in_lines:
            first = self._pause = LONG_IN_LOGS if within else PAUSE
        self._is_hidden = disable or not _is_first()
        self._due = math.inf if self._is_hidden else self._began + first
        if not (self._in_lines or within):
            self._show()

    def update(self, more: int = 1) -> None:
        """Add units that are done; takes less than a microsecond if nothing is shown."""
        self.done += more
        now = monotonic()
        self._updates.append((now, self.done))
        if now >= self._due:
            self._show()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; each counts as done when the next is requested."""
        for item in items:
            yield item
            self.update()

    def shorten(self, less: int) -> None:
        """Reduce the total by `less` units."""
        if self.total is not None:
            self.total -= less

    def close(self) -> None:
        """Show the final state; remove a stage within another from the screen."""
        if not self.within:
            self._every = 1
            self._show()
        with self._lock:
            self._is_hidden, self._due = True, math.inf
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # What is shown --------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Return the seconds since the stage began."""
        return monotonic() - self._began

    @property
    def amount(self) -> str:
        """Return such as "512/4,096 responses"; the unit is left out if it is also the label."""
        total = "?" if self.total is None else f"{self.total:,}"
        return f"{self.done:,}/{total}" + (f" {self.units}" if self.unit != self.label else "")

    @property
    def speed(self) -> str:
        """Return such as "38.1 responses/s" or "5 s a step"."""
        if not (rate := self._rate):
            return f"? {self.units}/s"
        if rate < 1:
            return f"{1 / rate:.3g} s a {self.unit}"
        return f"{rate:,.3g} {self.units}/s" if rate < 1000 else f"{rate:,.0f} {self.units}/s"

    @property
    def left(self) -> str:
        """Return such as "01:34 left", or "02:10 in all" at the end."""
        if self._is_over:
            return f"{clock(self.elapsed)} in all"
        if self.total is None or not (rate := self._rate):
            return "? left"
        return f"{clock((self.total - self.done) / rate)} left"

    @property
    def _is_over(self) -> bool:
        return self.total is not None and self.done >= self.total

    @property
    def _rate(self) -> float:
        """Return units per second; 0 while it is unknown."""
        if self._is_over:
            return (self.done - self._before) / max(self.elapsed, 1e-9)
        if len(self._updates) < 2:
            return 0.0
        (began, before), (ended, after) = self._updates[0], self._updates[-1]
        return (after - before) / max(ended - began, 1e-9)

    def _show(self) -> None:
        with self._lock:
            if self._is_hidden:
                return
            if self._in_lines:
                self._add_line()
            else:
                self._draw()

    def _add_line(self) -> None:
        if self.done - self._reported < self._every:
            return  # nothing new
        parts = (f"{self.label} {self.amount}", self.figures, self.speed, self.left)
        say(", ".join(part for part in parts if part))
        self._reported = self.done
        self._due = monotonic() + self._pause

    def _draw(self) -> None:
        if self._bar is None:
            from opd_lightning.terminal.progress_bar import Bar

            self._bar = Bar(self)
        else:
            self._bar.refresh()
        self._due = monotonic() + self._pause


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds, such as 01:34, with hours if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
