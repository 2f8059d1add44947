"""Temporary scaling of learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer


@contextmanager
def scaled(optimizers: Iterable[Optimizer], scale: float) -> Iterator[None]:
    """Multiply the learning rate of every parameter group inside the context.

    Schedules and checkpoints see the unscaled rate: many schedules derive a rate from the last one
    and would compound the scale.
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
