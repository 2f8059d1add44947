"""Layout of a run's weights over its processes, on which all estimates of cost depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from lightning.pytorch.strategies import DDPStrategy

from opd_lightning.models.sharding import processes_per_copy


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Number of processes, and the number of shards that the weights are divided into.

    Args:
        world: Processes that train together.
        shards: Processes that share one copy of the weights; 1 is DDP.
        per_node: Processes of one machine.
        copies_gradients: DDP reduces copies of the gradients, unless its
            `gradient_as_bucket_view` is on.
    """

    world: int = 1
    shards: int = 1
    per_node: int = 1
    copies_gradients: bool = False

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """Read the layout from a Lightning trainer, started or not."""
        strategy, world = trainer.strategy, trainer.num_devices * trainer.num_nodes
        views = getattr(strategy, "_ddp_kwargs", {}).get("gradient_as_bucket_view", False)
        return cls(
            world=world,
            shards=processes_per_copy(strategy),
            per_node=trainer.num_devices,
            copies_gradients=isinstance(strategy, DDPStrategy) and not views,
        )

    @property
    def replicas(self) -> int:
        """Copies of the weights: 1 under FSDP2, more under HSDP, `world` under DDP."""
        return self.world // self.shards

    def part(self, shape: Sequence[int]) -> int:
        """Return the elements of a tensor's largest shard, which is cut along the first axis.

        FSDP2 gives every process as many rows as the first one has, padding included.
        """
        if not shape:
            return 1
        rows, *rest = shape
        count = -(-rows // self.shards)
        for size in rest:
            count *= size
        return count

    def __str__(self) -> str:
        whose = "all weights each" if self.shards == 1 else f"1/{self.shards} of the weights each"
        nodes = self.world // self.per_node
        where = f" on {nodes} nodes" if nodes > 1 else ""
        return f"{self.world} processes{where}, {whose}" if self.world > 1 else "1 process"
