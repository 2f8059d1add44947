"""This process among those that train together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which process this is, and how all of them tell one another things."""

    rank: int
    world_size: int
    sum: Callable[[int], int]  # over all ranks
    gather: Callable[[Any], list[Any]]  # plain data of every rank, in their order

    def batches(self, count: int, size: int) -> list[range]:
        """This rank's share of `count` things, in batches; as many on all ranks, so some empty."""
        mine = range(self.rank, count, self.world_size)
        batches = -(-count // (self.world_size * size))
        return [mine[first : first + size] for first in range(0, batches * size, size)]

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """The ranks of a Lightning trainer."""
        strategy = trainer.strategy

        def add_up(value: int) -> int:
            here = torch.tensor(value, dtype=torch.int64, device=strategy.root_device)
            return int(strategy.reduce(here, reduce_op="sum"))

        def gather(value: Any) -> list[Any]:
            if trainer.world_size == 1:
                return [value]
            values: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(values, value)
            return values

        return cls(
            rank=trainer.global_rank, world_size=trainer.world_size, sum=add_up, gather=gather
        )
