"""Learning rates on a scale, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer


@contextmanager
def scaled(optimizers: Iterable[Optimizer], scale: float) -> Iterator[None]:
    """Multiply the learning rate of every parameter group for as long as it lasts.

    What schedules and checkpoints see is the planned rate: many schedules make a rate from the
    last one, and would multiply it by the scale again and again.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    planned = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * scale
    try:
        yield
    finally:
        for group, rate in zip(groups, planned, strict=True):
            group["lr"] = rate
