"""What a healthy step looks like: a band for each figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from opd_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where a figure of a step should lie.

    A bound is a number, or a multiple of the figure's median over the run's first steps. Where a
    side has both, the wider one counts. None takes a bound away.

    Args:
        lowest: The least value.
        highest: The largest value.
        fall: The least multiple of the start.
        rise: The largest multiple of the start.
        patience: Steps in a row out of the band after which something is done.
    """

    lowest: float | None = None
    highest: float | None = None
    fall: float | None = None
    rise: float | None = None
    patience: int = 5

    figure: ClassVar[str]  # as it is logged
    most: ClassVar[float] = math.inf  # what the figure can be
    always: ClassVar[bool] = True  # whether every method logs it
    meaning: ClassVar[str]

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.patience < 1:
            raise UserError(f"{name}: patience is {self.patience}, expected 1 or more")
        sides = (self.lowest, self.highest, self.fall, self.rise)
        if all(bound is None for bound in sides):
            raise UserError(f"{name}: got no bound at all; set one, or the whole rule to null")
        if not all(bound is None or 0 <= bound < math.inf for bound in sides):
            raise UserError(f"{name}: got bounds {sides}, expected numbers of 0 or more")

    def bounds(self, start: float) -> tuple[float, float]:
        """The least and the largest value in the band, for a figure that began at `start`."""
        below = [self.lowest, None if self.fall is None else self.fall * start]
        above = [self.highest, None if self.rise is None else self.rise * start]
        return (
            min((bound for bound in below if bound is not None), default=-math.inf),
            max((bound for bound in above if bound is not None), default=math.inf),
        )


@dataclass(frozen=True, kw_only=True)
class Truncation(Band):
    """Share of responses cut at `sampling.max_new_tokens`; it went to 1 in 2604.08527's runs."""

    highest: float | None = 0.3
    rise: float | None = 1.5

    figure: ClassVar[str] = "response/truncated"
    most: ClassVar[float] = 1.0
    meaning: ClassVar[str] = "so responses do not end any more"


@dataclass(frozen=True, kw_only=True)
class Repetition(Band):
    """Share of responses that run in circles; 0.3 to 0.6 after collapse in 2604.08527's runs.

    The figure is 0 for responses shorter than 10,000 characters: see `metrics/repetition.py`.
    """

    highest: float | None = 0.1
    rise: float | None = 3.0

    figure: ClassVar[str] = "response/repetitive"
    most: ClassVar[float] = 1.0
    meaning: ClassVar[str] = "so responses run in circles"


@dataclass(frozen=True, kw_only=True)
class Entropy(Band):
    """Entropy of the student per token, in nats: low when it says one thing, high when anything."""

    fall: float | None = 0.02
    highest: float | None = 1.0
    rise: float | None = 3.0

    figure: ClassVar[str] = "entropy/student"
    meaning: ClassVar[str] = "so the student says always the same, or anything"


@dataclass(frozen=True, kw_only=True)
class Length(Band):
    """Mean length of the student's responses in tokens."""

    fall: float | None = 0.2
    rise: float | None = 4.0

    figure: ClassVar[str] = "response/length"
    meaning: ClassVar[str] = "so responses are far from the length they had"


@dataclass(frozen=True, kw_only=True)
class Disagreement(Band):
    """Mean size of d_t = log pi_T - log pi_S on the sampled tokens, in nats.

    A run that learns from its teacher comes closer to it. One that breaks, in whatever form, writes
    what the teacher would not. Methods without a teacher do not log the figure.
    """

    highest: float | None = 1.0
    rise: float | None = 3.0

    figure: ClassVar[str] = "signal/log_ratio_abs_mean"
    always: ClassVar[bool] = False
    meaning: ClassVar[str] = "so the student leaves its teacher"
