"""Numbers that change with the optimiser step, counted from 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from opd_lightning.errors import UserError


class Schedule(ABC):
    """A number for every optimiser step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at an optimiser step."""


def value_at(value: float | Schedule, step: int) -> float:
    """A setting that is either a number or a schedule, at an optimiser step."""
    return value(step) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step.

    Args:
        value: The number.
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line, then its end, such as KDRL's coefficient (2506.02208).

    Args:
        start: The value at step 0.
        end: The value from step `steps` on.
        steps: Length of the line in optimiser steps.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"Linear: steps is {self.steps}, expected 1 or more")

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


@dataclass(frozen=True)
class ThreePhaseCosine(Schedule):
    """SG-OPD's weight of the teacher-sampled term (2606.09304): plateau, half cosine, nothing.

        start                                                        step <= phase1_end
        end + (start - end) / 2 (1 + cos(pi (step - P1) / (P2 - P1)))  up to phase2_end
        0                                                            after phase2_end

    It falls from `end` to 0 in one step, so `end` 0 is the smooth choice. The authors' phases end
    at 30 % and 35 % of the run; they publish neither value: 0.2 and 0 are ours.

    Args:
        start: The value of the first phase.
        end: The value that the cosine reaches.
        phase1_end: Last step of the first phase.
        phase2_end: Last step of the cosine.
    """

    phase1_end: int
    phase2_end: int
    start: float = 0.2
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.phase1_end <= self.phase2_end:
            raise UserError(
                f"ThreePhaseCosine: phase1_end is {self.phase1_end} and phase2_end "
                f"{self.phase2_end}, expected 0 <= phase1_end <= phase2_end"
            )

    def __call__(self, step: int) -> float:
        if step <= self.phase1_end:
            return self.start
        if step > self.phase2_end:
            return 0.0
        progress = (step - self.phase1_end) / (self.phase2_end - self.phase1_end)
        return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Staircase(Schedule):
    """`min(maximum, start + floor(step / every) increment)`: Fast-OPD's growing prefix.

    Form, start and increment are those that 2607.29494 quotes; it tried `every` 5, 10 and 20 and
    found the outcome sensitive to it, and `every` 10 is no more than our middle. Fast-OPD
    (2602.15260) itself is said to add 256 at every step.

    Args:
        maximum: The value that is never exceeded.
        start: The value at step 0.
        increment: Height of a stair.
        every: Steps that a stair lasts.
    """

    maximum: float
    start: float = 1024.0
    increment: float = 1024.0
    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"Staircase: every is {self.every}, expected 1 or more")

    def __call__(self, step: int) -> float:
        return min(self.maximum, self.start + step // self.every * self.increment)
