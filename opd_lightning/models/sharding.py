"""FSDP2: every process keeps a part of each weight, and layers are whole while they are at work.

Under HSDP (`hsdp.py`) it is a part of its group's weights, and the groups are alike.

A decoder layer is gathered for its forward pass and again for its backward pass. What is left of a
model (embedding, last norm, head) is gathered by the forward call of its root, and stays whole
until the root's backward pass is over, or until `rest` where there is none: the head of a teacher
is read after its forward call, inside the student's and once more in the student's backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from opd_lightning.errors import UserError


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


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Which processes share the weights, and how.

    `compute_dtype` is what autocast would turn the student's layers into: gathering them in it
    halves the traffic, and frees them after their forward pass, where autocast would keep copies.
    Gradients are added up in float32. Embedding, norm and head keep their own dtype.
    """

    mesh: DeviceMesh  # all processes; under HSDP [groups, processes of a group]
    device: torch.device
    compute_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, trainer: Any) -> Sharding | None:
        """What a Lightning trainer's strategy says; None where every process has all weights."""
        strategy = trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return None
        mesh = strategy.device_mesh
        return cls(
            mesh=mesh if isinstance(strategy, HSDPStrategy) else mesh["data_parallel"],
            device=strategy.root_device,
            compute_dtype=torch.bfloat16 if trainer.precision == "bf16-mixed" else None,
        )

    @property
    def reads(self) -> bool:
        """Whether this process reads weights from disk; the others get theirs from it."""
        return dist.get_rank() == 0

    def spread(self, root: nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
        """Shard `root`: real where `reads` is true, on the meta device elsewhere.

        Layer by layer: rank 0's weights go to everybody, and everybody keeps its part, so that
        no device ever holds more than one whole layer, or what is no layer.
        """
        for layer, inside in units(root):
            _bring(inside, self.device)
            for tensor in _tensors(inside):
                dist.broadcast(tensor.detach(), src=0)
            self._shard(layer, compute_dtype if layer is not root else None)

    def copy(self, root: nn.Module, original: nn.Module) -> None:
        """Shard `root`, on the meta device everywhere, with the weights of a sharded `original`."""
        for layer, inside in units(root):
            _bring(inside, self.device)
            self._shard(layer, None)
        pairs = zip(_tensors(root.modules()), _tensors(original.modules()), strict=True)
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def _shard(self, unit: nn.Module, dtype: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            cast_forward_inputs=False,  # autocast decides, as it does without sharding
        )
        fully_shard(unit, mesh=self.mesh, mp_policy=policy)


def check_strategy(strategy: Any, devices: int, nodes: int) -> None:
    """Refuse ways of sharing the work that teachers, weights and checkpoints know nothing of."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"trainer.strategy: got {type(strategy).__name__}, expected ddp, or "
            "ModelParallelStrategy to shard the weights; configs/strategy has all of them"
        )
    if isinstance(strategy, HSDPStrategy):
        size = strategy.group_size
        if size < 1 or devices * nodes % size:
            raise UserError(
                f"trainer.strategy.shard_size: got {size} for {devices} devices on {nodes} nodes, "
                "expected a divisor of their product"
            )
    elif isinstance(strategy, ModelParallelStrategy):
        sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
        got = tuple(a if s == "auto" else s for s, a in zip(sizes, (nodes, devices), strict=True))
        if got != (devices * nodes, 1):
            raise UserError(
                f"trainer.strategy: got data_parallel_size {got[0]} and tensor_parallel_size "
                f"{got[1]} for {devices} devices on {nodes} nodes, expected their product and 1"
            )


def holders(strategy: Any) -> int:
    """How many processes hold one copy of the weights together."""
    if isinstance(strategy, HSDPStrategy):
        return strategy.group_size
    shares = isinstance(strategy, ModelParallelStrategy)
    return strategy.num_processes * strategy.num_nodes if shares else 1


def rest(root: nn.Module) -> None:
    """Give back what the last forward call of a root without a backward pass left gathered."""
    assert isinstance(root, FSDPModule)
    root.reshard()
    # FSDP notes the order of layers for the backward pass, which would empty the notes.
    state = root._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for one in state._state_ctx.all_states:
        for group in one._fsdp_param_groups:
            group._post_forward_indices.clear()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard, and any other tensor as it is; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Write a whole value, which every rank has, to a tensor or to this process's shard of it."""
    if isinstance(target, DTensor):
        here = value.to(target.device)
        value = distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def units(root: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Every decoder layer, then the root, each with the modules that are its own."""
    # transformers' own list of blocks that must stay together.
    names = {n for m in root.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    units: list[tuple[nn.Module, list[nn.Module]]] = []
    taken: set[nn.Module] = set()
    for module in root.modules():
        if type(module).__name__ in names and module not in taken:
            units.append((module, list(module.modules())))
            taken.update(module.modules())
    if not units:
        raise UserError(
            f"trainer.strategy: got sharding, but {type(root).__name__}'s model does not name its "
            "layers (_no_split_modules); train it with strategy ddp"
        )
    return [*units, (root, [module for module in root.modules() if module not in taken])]


def _bring(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move to `device`, tied parameters still tied; what was on the meta device has no value."""
    moved: dict[Any, Any] = {}

    def there(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device)
        return tensor.detach().to(device)

    for module in modules:
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in moved:
                moved[old] = nn.Parameter(there(old), requires_grad=old.requires_grad)
            setattr(module, name, moved[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, there(buffer))


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters, each once, and buffers."""
    inside = list(modules)
    parameters = dict.fromkeys(p for m in inside for p in m.parameters(recurse=False))
    return [*parameters, *(b for m in inside for b in m.buffers(recurse=False))]
