"""Bands of the logged figures of a healthy step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from opd_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Band:
    """Range of a figure in a healthy step.

    A bound is a number, or a multiple of the figure's start, its median over the run's first steps.
    If a side has both, the wider one applies. None removes a bound.

    Args:
        lowest: Smallest value.
        highest: Largest value.
        fall: Smallest multiple of the start.
        rise: Largest multiple of the start.
        patience: Consecutive steps outside the band after which the action is taken.
    """

    lowest: float | None = None
    highest: float | None = None
    fall: float | None = None
    rise: float | None = None
    patience: int = 5

    figure: ClassVar[str]  # logged name
    most: ClassVar[float] = math.inf  # upper bound of the figure
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
        """Return the smallest and largest value in the band of a figure with this start."""
        below = [self.lowest, None if self.fall is None else self.fall * start]
        above = [self.highest, None if self.rise is None else self.rise * start]
        return (
            min((bound for bound in below if bound is not None), default=-math.inf),
            max((bound for bound in above if bound is not None), default=math.inf),
        )


@dataclass(frozen=True, kw_only=True)
class Truncation(Band):
    """Share of responses cut at `sampling.max_new_tokens`; rose to 1 in the runs of 2604.08527."""

    highest: float | None = 0.3
    rise: float | None = 1.5

    figure: ClassVar[str] = "response/truncated"
    most: ClassVar[float] = 1.0
    meaning: ClassVar[str] = "so responses do not end any more"


@dataclass(frozen=True, kw_only=True)
class Repetition(Band):
    """Share of repetitive responses; 0.3 to 0.6 after collapse in the runs of 2604.08527.

    The figure is 0 for responses shorter than 10,000 characters: see `metrics/repetition.py`.
    """

    highest: float | None = 0.1
    rise: float | None = 3.0

    figure: ClassVar[str] = "response/repetitive"
    most: ClassVar[float] = 1.0
    meaning: ClassVar[str] = "so responses run in circles"


@dataclass(frozen=True, kw_only=True)
class Entropy(Band):
    """Entropy of the student per token, in nats; collapse may lower or raise it."""

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
    """Mean absolute d_t = log pi_T - log pi_S on the sampled tokens, in nats.

    It falls while a run learns from its teacher. After any form of collapse the student's responses
    are unlikely under the teacher. Methods without a teacher do not log the figure.
    """

    highest: float | None = 1.0
    rise: float | None = 3.0

    figure: ClassVar[str] = "signal/log_ratio_abs_mean"
    always: ClassVar[bool] = False
    meaning: ClassVar[str] = "so the student leaves its teacher"
