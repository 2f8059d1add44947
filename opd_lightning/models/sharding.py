"""FSDP2 and HSDP: every process holds a shard of each weight; layers are gathered for use.

Under HSDP the processes of a group shard the weights, and all groups hold the same.

A decoder layer is gathered for its forward pass and again for its backward pass. The other modules
(embedding, last norm, head) are gathered by the root's forward call. They stay gathered until the
root's backward pass ends, or until `reshard` if there is none: the head of a teacher is used after
its forward call, in the student's forward call and again in the student's backward pass.
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
    """Strategy that shards weights over the processes of a group, typically a node.

    All groups hold the same weights. Layers are gathered within a group. Between groups only
    gradients are exchanged, the shard of each process once per micro-batch.

    Args:
        shard_size: Number of processes of a group, consecutive by rank. None uses those of a node.
            With all processes in one group it is FSDP2.
        save_distributed_checkpoint: Write a folder of shards instead of one file, which is gathered
            in rank 0's memory.
        timeout: Time limit of collectives.
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
        """Number of processes that share one copy of the weights."""
        return self.num_processes if self.shard_size is None else self.shard_size

    def setup_environment(self) -> None:
        """Set up the environment as Lightning does, with a two-dimensional device mesh."""
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
    """Mesh and dtype with which weights are sharded.

    `compute_dtype` is the dtype to which autocast would cast the student's layers. Gathering in it
    halves the traffic and frees them after their forward pass; autocast would keep copies.
    Gradients are summed in float32. Embedding, norm and head keep their dtype.
    """

    mesh: DeviceMesh  # all processes; under HSDP [groups, processes of a group]
    device: torch.device
    compute_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, trainer: Any) -> Sharding | None:
        """Build from a Lightning trainer's strategy; None if every process has all weights."""
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
        """Return whether this process reads the weights from disk and broadcasts them."""
        return dist.get_rank() == 0

    def shard(self, root: nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
        """Shard `root`, which has weights where `reads` is true, else is on the meta device.

        Rank 0 broadcasts the weights unit by unit, and every rank keeps its shard, so that no
        device holds more than one full layer at a time, or the modules outside of layers.
        """
        for module in root.modules():  # calls are collectives, and all ranks make the same
            if hasattr(module, "opd_shares_prompts"):
                module.opd_shares_prompts = False  # type: ignore[assignment]
        for layer, inside in shard_units(root):
            _materialise(inside, self.device)
            for tensor in _tensors(inside):
                dist.broadcast(tensor.detach(), src=0)
            self._fully_shard(layer, compute_dtype if layer is not root else None)

    def copy(self, root: nn.Module, original: nn.Module) -> None:
        """Shard `root`, on the meta device everywhere, with the weights of a sharded `original`."""
        for layer, inside in shard_units(root):
            _materialise(inside, self.device)
            self._fully_shard(layer, None)
        pairs = zip(_tensors(root.modules()), _tensors(original.modules()), strict=True)
        with torch.no_grad():
            for target, source in pairs:
                target.copy_(source)

    def _fully_shard(self, unit: nn.Module, dtype: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            cast_forward_inputs=False,  # autocast decides, as it does without sharding
        )
        fully_shard(unit, mesh=self.mesh, mp_policy=policy)


def check_strategy(strategy: Any, devices: int, nodes: int) -> None:
    """Raise UserError for strategies that teachers, weights and checkpoints do not support."""
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


def processes_per_copy(strategy: Any) -> int:
    """Return the number of processes that share one copy of the weights."""
    if isinstance(strategy, HSDPStrategy):
        return strategy.group_size
    shares = isinstance(strategy, ModelParallelStrategy)
    return strategy.num_processes * strategy.num_nodes if shares else 1


def reshard(root: nn.Module) -> None:
    """Free the weights that the last forward call of a root without a backward pass gathered."""
    assert isinstance(root, FSDPModule)
    root.reshard()
    # FSDP records the order of layers for the backward pass, which would clear the record.
    state = root._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for one in state._state_ctx.all_states:
        for group in one._fsdp_param_groups:
            group._post_forward_indices.clear()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard, or any other tensor unchanged; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full(target: Tensor, value: Tensor) -> None:
    """Copy a full value, given on every rank, to a tensor or to this process's shard of it."""
    if isinstance(target, DTensor):
        here = value.to(target.device)
        value = distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def shard_units(root: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return every decoder layer, then the root, each with the modules that belong to it."""
    units = [(layer, list(layer.modules())) for layer in decoder_layers(root)]
    if not units:
        raise UserError(
            f"trainer.strategy: got sharding, but {type(root).__name__}'s model does not name its "
            "layers (_no_split_modules); train it with strategy ddp"
        )
    taken = {module for _, inside in units for module in inside}
    return [*units, (root, [module for module in root.modules() if module not in taken])]


def decoder_layers(root: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: transformers' modules that must not be split."""
    names = {n for m in root.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    layers: list[nn.Module] = []
    taken: set[nn.Module] = set()
    for module in root.modules():
        if type(module).__name__ in names and module not in taken:
            layers.append(module)
            taken.update(module.modules())
    return layers


def _materialise(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move to `device`, keeping ties; tensors from the meta device are uninitialised."""
    moved: dict[Any, Any] = {}

    def on_device(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device)
        return tensor.detach().to(device)

    for module in modules:
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in moved:
                moved[old] = nn.Parameter(on_device(old), requires_grad=old.requires_grad)
            setattr(module, name, moved[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, on_device(buffer))


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return parameters, each once, and buffers."""
    inside = list(modules)
    parameters = dict.fromkeys(p for m in inside for p in m.parameters(recurse=False))
    return [*parameters, *(b for m in inside for b in m.buffers(recurse=False))]
