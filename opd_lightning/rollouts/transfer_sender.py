"""Sender of a weight transfer: vLLM's own over NCCL, and an equivalent over gloo.

Imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from opd_lightning.errors import UserError
from opd_lightning.serving.gloo_group import GlooGroup, free_port
from opd_lightning.serving.transfer_client import TransferClient

Transport = Literal["nccl", "gloo"]
CHUNK_BYTES = 2**28  # a chunk ends with the tensor that exceeds it; NCCL buffers two chunks


class _Metadata(list[ParamMeta]):
    """Metadata of all tensors: vLLM 0.33 reads an attribute, 0.32 calls a method."""

    def __call__(self) -> Self:
        return self


class Source:
    """The student's weights in the form that vLLM's senders read: metadata, then an iterator.

    Args:
        tensors: Tensors of all names, shapes and dtypes (meta device), in the order of `weights`.
        device: Device to send from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self.device = device
        self.metadata = _Metadata(ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in tensors.items())
        self.weights: Iterable[tuple[str, Tensor]] = ()  # weights of the current push

    def implements_iter_full(self) -> bool:
        """Return True: vLLM 0.33 asks whether it may call `iter_full`."""
        return True

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate, as vLLM 0.33 does."""
        return iter(self)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate, as vLLM 0.32 does."""
        expected = iter(self._tensors)
        for name, tensor in self.weights:
            if name != (announced := next(expected)):
                raise UserError(
                    f"engine.push: {name!r} came where {announced!r} was announced: this model's "
                    "weights have no fixed order; use push: folder"
                )
            yield name, tensor.to(self.device, self._tensors[name].dtype)
            del tensor  # before the next is gathered


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """vLLM's init arguments, extended by the seconds that the group waits for a member."""

    backend: ClassVar[str] = "gloo"

    timeout: float = 600.0


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """vLLM's NCCL sender with a gloo group instead."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: TransferClient, source: Any = None
    ) -> Self:
        """Make the servers join, and wait for them."""
        size = init_info.packed_buffer_size_bytes
        engine = cls(client=client, source=source, packed_buffer_size_bytes=size)
        receivers = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
            packed_buffer_size_bytes=size,
        )
        with ThreadPoolExecutor(max_workers=1) as pool:
            joined = pool.submit(client.init_weight_transfer_engine, worker_init_payload(receivers))
            engine.model_update_group = GlooGroup.lead(
                init_info.master_address,
                init_info.master_port,
                world_size=init_info.world_size,
                timeout=init_info.timeout,
            )
            joined.result()
        return engine

    def _broadcast(self, source: Source, meta: list[ParamMeta]) -> None:
        pairs = self._checked_iter(source, meta)
        while chunk := pack_tensors(pairs, lambda pair: pair[1], self.packed_buffer_size_bytes):
            self.model_update_group.broadcast(chunk.packed_tensor)


WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)


def open_sender(
    transport: Transport,
    *,
    host: str,
    receivers: int,
    timeout: float,
    client: TransferClient,
    source: Source,
) -> Any:
    """Form a group with the servers and return vLLM's sender.

    Args:
        transport: Library that carries the tensors.
        host: Address of this machine at which the servers join the group.
        receivers: Number of workers of all servers.
        timeout: Seconds that a gloo group waits for a member.
        client: Sends the requests to the servers.
        source: The tensors to send.
    """
    place = {
        "rank": 0,  # only rank 0 sends
        "master_address": host,
        "master_port": free_port(host),
        "world_size": 1 + receivers,
        "packed_buffer_size_bytes": CHUNK_BYTES,
    }
    init_info = (
        NCCLTrainerInitInfo(**place)
        if transport == "nccl"
        else GlooTrainerInitInfo(**place, timeout=timeout)
    )
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
