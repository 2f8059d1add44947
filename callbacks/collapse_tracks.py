"""Per-figure state of a run: start values and consecutive steps outside the band."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import Any

from .collapse_rules import Band


class Track:
    """State of one figure of a run.

    Args:
        band: Band of the figure.
        start_steps: Number of first values, whose median is the start; not compared with the band.
    """

    def __init__(self, band: Band, start_steps: int) -> None:
        self.band = band
        self.start_steps = start_steps
        self.first: list[float] = []  # first `start_steps` values
        self.outside = 0  # consecutive values outside the band, up to the latest
        self.since = 0  # step of the first of them
        self.value = math.nan  # latest

    def add(self, value: float, step: int) -> None:
        """Add the figure's value of a step."""
        self.value = value
        if math.isfinite(value) and len(self.first) < self.start_steps:
            self.first.append(value)
            return
        low, high = self.bounds
        if low <= value <= high:
            self.outside = 0
        else:
            self.since = self.since if self.outside else step
            self.outside += 1

    @property
    def has_start(self) -> bool:
        """Return whether all values that make up the start have come."""
        return len(self.first) == self.start_steps

    @property
    def is_out_of_patience(self) -> bool:
        """Return whether the figure has been outside its band for `patience` steps or more."""
        return self.outside >= self.band.patience

    @property
    def bounds(self) -> tuple[float, float]:
        return self.band.bounds(self.start)

    @property
    def start(self) -> float:
        return median(self.first or [0.0])

    def __str__(self) -> str:
        low, high = self.bounds
        sides = [] if low == -math.inf else [f"at least {low:.3g}"]
        sides += [] if high == math.inf else [f"at most {high:.3g}"]
        return (
            f"{type(self.band).__name__}: {self.band.figure} is {self.value:.3g}, out of its band "
            f"({', '.join(sides)}) for {self.outside} steps, {self.band.meaning}"
        )

    def why_idle(self) -> str | None:
        """Return why the figure can never leave its band, or None if it can."""
        name, rule = self.band.figure, type(self.band).__name__
        low, high = self.bounds
        if not self.first and not self.band.always:
            return None
        if not self.first:
            return (
                f"{rule}: the first {self.start_steps} steps do not log {name}; set the rule to "
                "null if none will"
            )
        if low <= 0 and high >= self.band.most:
            return (
                f"{rule}: {name} began at {self.start:.3g}, so that it can never leave its band "
                f"(at most {high:.3g}); set the rule's rise to null, or allow longer responses"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self.first), "outside": self.outside, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.outside = [float(x) for x in state["first"]], state["outside"]
        self.since = state.get("since", 0)  # earlier versions did not save it


class Tracks:
    """State of all watched figures of a run.

    Args:
        bands: Bands of the figures.
        start_steps: Number of values that make up a start.
    """

    def __init__(self, bands: Iterable[Band], start_steps: int) -> None:
        self.start_steps = start_steps
        self.watched = 0  # steps
        self.measured: list[Track] = []  # those with a figure of the latest step
        self._started: list[Track] = []  # those whose start is complete with the latest step
        self._tracks = {band.figure: Track(band, start_steps) for band in bands}

    def __iter__(self) -> Iterator[Track]:
        return iter(self._tracks.values())

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Add the figures of a step; tracks of figures that it does not have do not change."""
        self.watched += 1
        self.measured = [track for name, track in self._tracks.items() if name in figures]
        starting = [track for track in self.measured if not track.has_start]
        for track in self.measured:
            track.add(figures[track.band.figure], step)
        self._started = [track for track in starting if track.has_start]

    def reset_outside(self) -> None:
        """Reset the counts of steps outside the bands, after a step-back."""
        for track in self:
            track.outside = 0

    def why_idle(self) -> list[str]:
        """Return a line for each rule that no value can break, once its start is known."""
        ends = self.watched == self.start_steps
        missing = [track for track in self if not track.first] if ends else []
        reasons = (track.why_idle() for track in (*self._started, *missing))
        return [reason for reason in reasons if reason is not None]

    def state_dict(self) -> dict[str, Any]:
        tracks = {name: track.state_dict() for name, track in self._tracks.items()}
        return {"watched": self.watched, "tracks": tracks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state. Rules enabled since start anew; disabled ones are dropped."""
        self.watched = state["watched"]
        for name in self._tracks.keys() & state["tracks"].keys():
            self._tracks[name].load_state_dict(state["tracks"][name])
