"""What all processes of a run must agree on before they go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from opd_lightning.errors import raised_by_all

T = TypeVar("T")


def gather(mine: T) -> list[T]:
    """Every process's value, by rank; all must ask."""
    if not dist.is_initialized():
        return [mine]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values  # type: ignore[return-value]


def tell(decide: Callable[[], T]) -> T:
    """What rank 0 decides; what it raises, all raise."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            outcome = [(decide(), None)]
        except Exception as error:
            outcome = [(None, error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    decision, failure = outcome[0]
    if failure is not None:
        raise raised_by_all(failure)
    return decision  # type: ignore[return-value]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
