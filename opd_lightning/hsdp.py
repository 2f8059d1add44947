"""HSDP: FSDP2 within groups of processes, and every group has all weights."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh


class HSDPStrategy(ModelParallelStrategy):
    """Weights sharded over the processes of a group, typically a node, and equal in all groups.

    Layers are gathered within a group alone; between groups only gradients travel, each process's
    part of them once per micro-batch.

    Args:
        shard_size: Processes of a group: neighbours by rank. None takes those of a node. With as
            many as there are it is FSDP2.
        save_distributed_checkpoint: Write a folder of shards instead of one file, which is gathered
            in rank 0's memory.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=timeout)
        self.shard_size = shard_size

    @property
    def group_size(self) -> int:
        """Processes that hold the weights together."""
        return self.num_processes if self.shard_size is None else self.shard_size

    def setup_environment(self) -> None:
        """Lightning's own, but for the mesh."""
        self._setup_distributed()
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self.world_size // self.group_size, self.group_size),
            mesh_dim_names=("replicate", "shard"),
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
