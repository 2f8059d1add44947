"""A run as far as its cost goes: what memory and traffic are predicted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning.models.sharding import shard_units
from opd_lightning.preflight.activations import Arithmetic, Widths
from opd_lightning.preflight.layout import Layout

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class TeacherModel(NamedTuple):
    """A teacher's model in the trainer's process."""

    model: nn.Module
    sharded: bool = False  # as the student is
    offloaded: bool = False  # in CPU memory, and on the device while a step trains


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Models may be on the meta device: only shapes, dtypes and what trains are read.

    Args:
        student: As every process builds it, LoRA included and not yet sharded.
        config: Its transformers configuration.
        optimizer: Of its parameters.
        layout: How processes share it.
        precision: `trainer.precision`.
        checkpointing: Whether activations are computed again in the backward pass.
        on_gpu: Whether the trainer's device is one.
        rows: Rollouts of the largest micro-batch.
        length: Tokens of the longest sequence, prompt and response.
        response: Tokens of the longest response.
        micro_batches: Of a step.
        teachers: Models of teachers in this process, each once.
        engine: Bytes of the engine in this process.
        engine_sleeps: Whether it gives them back while the trainer works.
        pushed: What engines, here or elsewhere, keep the student's weights in; None without one.
        compares_with_start: Whether validations read the student's folder again, to compare with
            it; without LoRA, as an adapter is switched off instead.
        readings: Teachers that are the student itself, read without a gradient.
    """

    student: nn.Module
    config: Any
    optimizer: Optimizer
    layout: Layout
    precision: str
    checkpointing: bool
    on_gpu: bool
    rows: int
    length: int
    response: int
    micro_batches: int
    teachers: Sequence[TeacherModel] = ()
    engine: int = 0
    engine_sleeps: bool = False
    pushed: torch.dtype | None = None
    compares_with_start: bool = False
    readings: int = 0

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The student's."""
        return list(self.student.parameters())

    @cached_property
    def units(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The student's, of `layers_and_rest`."""
        return layers_and_rest(self.student)

    @cached_property
    def widths(self) -> Widths:
        return Widths.of(self.config)

    @property
    def head_trains(self) -> bool:
        """Whether the head, or the embedding that it is tied to, gets a gradient."""
        shape = (self.widths.vocabulary, self.widths.hidden)
        return any(tuple(p.shape) == shape for p in trained(self.units[1]))

    @property
    def autocast(self) -> torch.dtype | None:
        """What layers are gathered or copied in; None for their own dtype."""
        return AUTOCAST.get(self.precision)

    @property
    def reduced(self) -> torch.dtype | None:
        """What the gradients of sharded layers are added up in; None for the weights' own dtype."""
        return torch.float32 if self.autocast else None

    @property
    def arithmetic(self) -> Arithmetic:
        stream = next(p for p in self.parameters if p.dim() > 1).element_size()
        return Arithmetic(stream, self.autocast.itemsize if self.autocast else stream)


def layers_and_rest(model: nn.Module) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Parameters of every decoder layer, and of what is none, as FSDP2 gathers them."""
    own: list[list[Tensor]] = [
        list(dict.fromkeys(p for m in inside for p in m.parameters(recurse=False)))
        for _, inside in shard_units(model)
    ]
    return own[:-1], own[-1]


def trained(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that get a gradient."""
    return [t for t in tensors if t.requires_grad]


def nbytes(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> int:
    """Of whole tensors, in `dtype` or in their own."""
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors)
