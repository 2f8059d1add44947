"""How far a long stage is: a bar where somebody watches, a line now and then in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from tqdm import tqdm

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {speed}{postfix}]"
LINE = "{desc} {n_fmt}/{total_fmt}{postfix}, {speed}, {left}"
PAUSE = 10.0  # seconds between two lines of a log
LONG = 5.0  # seconds that a call takes before its own bar shows


def is_watched() -> bool:
    """Whether stderr is a terminal; a task of srun writes to a log in any case."""
    return sys.stderr.isatty() and "SLURM_STEP_ID" not in os.environ


class Progress(tqdm):
    """What is done of a stage, its rate and the time left, on stderr.

    Example, of what a log gets: "generate 512/4,096 responses, 38.1 responses/s, 01:34 left".

    Args:
        label: What the stage is called.
        total: How much there is to do; None: nobody knows.
        unit: Of what, in the singular.
        every: Least difference between two lines of a log; they are `PAUSE` apart in any case.
        stays: Say at the end what was done; else the bar vanishes, and a short stage has no line.
        disable: Show nothing.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        every: int = 1,
        stays: bool = True,
        disable: bool = False,
    ) -> None:
        self.in_lines = not is_watched()
        how: dict[str, Any] = {"bar_format": BAR, "file": sys.stderr, "dynamic_ncols": True}
        if self.in_lines:
            how = {"bar_format": LINE, "file": _Lines(sys.stderr), "position": 0}
            how |= {"mininterval": PAUSE, "miniters": every}
            self._told: float | None = None  # how much was done at the last line
        super().__init__(
            desc=label,
            total=total,
            unit=unit,
            leave=stays,
            smoothing=0,  # the rate is that of the whole stage
            disable=disable,
            **how,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Everything that a format may name."""
        known: dict[str, Any] = super().format_dict
        done, elapsed = self.n - known["initial"], known["elapsed"]
        rate = done / elapsed if elapsed else 0.0
        unit = self.unit
        if not rate:
            speed, left = f"? {unit}s/s", "? left"
        else:
            speed = f"{rate:,.3g} {unit}s/s" if rate < 1000 else f"{rate:,.0f} {unit}s/s"
            if rate < 1:
                speed = f"{1 / rate:.3g} s a {unit}"
            left = "? left"
            if self.total is not None and self.n < self.total:
                left = f"{self.format_interval((self.total - self.n) / rate)} left"
            elif self.total is not None:
                left = f"{self.format_interval(elapsed)} in all"
        return {**known, "speed": speed, "left": left}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """A log has no line without news."""
        if self.in_lines:
            if self.n in (self.initial, self._told):
                return None
            self._told = self.n
        shown: bool | None = super().display(msg, pos)
        return shown

    @classmethod
    def of_long_calls(cls) -> bool | Callable[..., Any]:
        """A bar for calls of a library that are sometimes long, once they are; no lines."""
        return is_watched() and partial(tqdm, delay=LONG, leave=False, file=sys.stderr)


class _Lines:
    """A file for tqdm: what it writes over and over again becomes lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text := text.strip():  # of what moves the cursor to the line's beginning
            print(text, file=self._file, flush=True)

    def flush(self) -> None:
        """Every line is."""
