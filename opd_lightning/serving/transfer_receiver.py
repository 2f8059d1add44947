"""Receiver of a weight transfer over NCCL or gloo; runs inside vLLM's workers."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from opd_lightning.serving.gloo_group import GlooGroup
from opd_lightning.serving.vllm_process import repack, undo_reload

Described = tuple[str, Sequence[int], torch.dtype]  # a tensor: its name, shape and dtype


@dataclass(kw_only=True)
class TransferInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's init arguments, extended by the transport.

    Args:
        transport: "nccl" or "gloo".
        group: Name of the group.
        timeout: Seconds that joining, or one push, may take.
    """

    transport: str
    group: str
    timeout: float


class TransferEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL receiver, extended by gloo and by time limits.

    NCCL calls cannot be interrupted: if the sender is gone, the process exits. With gloo only the
    push fails.
    """

    init_info_cls = TransferInitInfo
    group: str | None = None  # the group that this worker has joined

    def init_transfer_engine(self, init_info: TransferInitInfo) -> None:
        """Join the trainer's group."""
        self._timeout = init_info.timeout
        if init_info.transport == "nccl":
            with process_ends_after(init_info.timeout, "joining the trainer's NCCL group"):
                super().init_transfer_engine(init_info)
        else:
            parallel = self.parallel_config
            own = parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
            self.model_update_group = GlooGroup.join(
                init_info.master_address,
                init_info.master_port,
                rank=init_info.rank_offset + own,
                world_size=init_info.world_size,
                timeout=init_info.timeout,
            )
        self.group = init_info.group
        self._described: list[Described] = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all weights. After a failure the model runs, with some old and some new ones."""
        on_gloo = isinstance(self.model_update_group, GlooGroup)
        push = process_ends_after(self._timeout, "a push over NCCL")
        try:
            with nullcontext() if on_gloo else push:
                super().update_weights(update_info)
        except BaseException:
            self.shutdown()  # so that the sender does not wait for this worker
            undo_reload(self.model)
            raise

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive weights from rank 0, one chunk at a time."""
        if not isinstance(self.model_update_group, GlooGroup):
            super().receive_weights(update_info)
            return
        if update_info.names:  # vLLM 0.33 leaves them out where they are those of the last push
            dtypes = [getattr(torch, name) for name in update_info.dtype_names]
            self._described = list(zip(update_info.names, update_info.shapes, dtypes, strict=True))
        with disable_mtp_completeness_check():
            for chunk in chunks(self._described, self.packed_buffer_size_bytes):
                names, shapes, kinds = zip(*chunk, strict=True)
                sizes = [_size(one) for one in chunk]
                packed = torch.empty(sum(sizes), dtype=torch.uint8)
                self.model_update_group.broadcast(packed)
                self.model.load_weights(self._unpacked(packed, names, shapes, kinds, sizes))

    def finish_weight_update(self) -> None:
        """Finish the update, once every layer has its weights."""
        super().finish_weight_update()
        if not torch.cuda.is_available():
            repack(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None
        super().shutdown()

    def _unpacked(self, packed: Tensor, *described: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in unpack_tensor(packed, *described):
            yield name, tensor.to(self.device)


def chunks(described: Sequence[Described], most: int) -> Iterator[list[Described]]:
    """Group tensors as vLLM's `pack_tensors` does: a chunk ends once it exceeds `most` bytes."""
    chunk: list[Described] = []
    size = 0
    for one in described:
        chunk.append(one)
        size += _size(one)
        if size > most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def process_ends_after(seconds: float, what: str) -> Iterator[None]:
    """Exit this process with a one-line error unless the block is left in time."""

    def end() -> None:
        print(f"opd: error: {what} took more than {seconds:g} s; start again", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _size(described: Described) -> int:
    """Return the size in bytes."""
    _, shape, dtype = described
    return math.prod(shape) * dtype.itemsize
