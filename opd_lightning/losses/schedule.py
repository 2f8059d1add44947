"""Schedules: numbers as functions of the optimiser step, counted from 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from opd_lightning.errors import UserError


class Schedule(ABC):
    """Base of schedules: a number for every optimiser step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the value at an optimiser step."""


def value_at(value: float | Schedule, step: int) -> float:
    """Return a number, or the value of a schedule at an optimiser step."""
    return value(step) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class Constant(Schedule):
    """Constant schedule.

    Args:
        value: The value at every step.
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """Linear schedule, constant afterwards, such as KDRL's coefficient (2506.02208).

    Args:
        start: The value at step 0.
        end: The value from step `steps` on.
        steps: Length of the linear part in optimiser steps.
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
    """SG-OPD's weight of the teacher-sampled term (2606.09304): constant, half cosine, then 0.

        start                                                        step <= phase1_end
        end + (start - end) / 2 (1 + cos(pi (step - P1) / (P2 - P1)))  up to phase2_end
        0                                                            after phase2_end

    After phase2_end it drops from `end` to 0 in one step, so only `end` 0 is continuous. The
    authors' phases end at 30 % and 35 % of the run. They publish neither value; 0.2 and 0 are ours.

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

    Form, start and increment are those that 2607.29494 quotes. It tried `every` 5, 10 and 20 and
    found the result sensitive to it; the default 10 is our choice of the middle. Fast-OPD
    (2602.15260) itself reportedly adds 256 at every step.

    Args:
        maximum: Upper bound of the value.
        start: The value at step 0.
        increment: Amount added every `every` steps.
        every: Number of optimiser steps between increments.
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
