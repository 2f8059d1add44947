"""This process among those that train together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which process this is, and how all of them add numbers up."""

    rank: int
    world_size: int
    sum: Callable[[int], int]  # over all ranks

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """The ranks of a Lightning trainer."""
        strategy = trainer.strategy

        def add_up(value: int) -> int:
            here = torch.tensor(value, dtype=torch.int64, device=strategy.root_device)
            return int(strategy.reduce(here, reduce_op="sum"))

        return cls(rank=trainer.global_rank, world_size=trainer.world_size, sum=add_up)
