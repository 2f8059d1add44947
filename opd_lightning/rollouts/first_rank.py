"""What one rank does for all: asking servers that all ranks share to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from opd_lightning.errors import raised_by_all


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def first_alone(first: Callable[[], Any], others: Callable[[], Any] = lambda: None) -> Any:
    """The first rank does `first`, the others `others`; all get its result, or raise its error."""
    if not dist.is_initialized():
        return first()
    dist.barrier()  # nobody is asking the servers for anything any more
    try:
        outcome = [first() if is_first() else others()]
    except Exception as error:
        outcome = [error]
    own = outcome[0]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise raised_by_all(outcome[0])
    if isinstance(own, Exception):
        raise own
    return outcome[0]


def drain(weights: Iterable[Any]) -> None:
    """Gathering the weights takes all ranks, to the end."""
    for _ in weights:
        pass
