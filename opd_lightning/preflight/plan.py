"""Description of a run from which memory and traffic are estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning.models.sharding import shard_units
from opd_lightning.preflight.activations import Arithmetic
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.widths import Widths

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class TeacherModel(NamedTuple):
    """Model of a teacher in the trainer's process."""

    model: nn.Module
    sharded: bool = False  # like the student
    offloaded: bool = False  # in CPU memory, and on the device during a step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, settings and models that determine a run's cost.

    Models may be on the meta device: only shapes, dtypes and `requires_grad` are read.

    Args:
        student: As every process builds it, LoRA included and not yet sharded.
        config: Its transformers configuration.
        optimizer: Optimiser of its parameters.
        layout: Layout of its weights over processes.
        precision: `trainer.precision`.
        checkpointing: Whether activations are recomputed in the backward pass.
        on_gpu: Whether the trainer's device is a GPU.
        rows: Rollouts of the largest micro-batch.
        length: Tokens of the longest sequence, prompt and response.
        response: Tokens of the longest response.
        micro_batches: Micro-batches of a step.
        teachers: Distinct models of teachers in this process.
        engine: Bytes of the student's engine in this process.
        demonstrator: Bytes of the demonstrator's engine in this process, which never sleeps.
        engine_sleeps: Whether it frees them while the trainer works.
        pushed: Dtype of the student's weights in engines, local or remote; None without one.
        compares_with_start: Whether validations load the student's initial weights; false with
            LoRA, as the adapter is disabled instead.
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
    demonstrator: int = 0
    engine_sleeps: bool = False
    pushed: torch.dtype | None = None
    compares_with_start: bool = False
    readings: int = 0

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Parameters of the student."""
        return list(self.student.parameters())

    @cached_property
    def units(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Parameters of the student, as in `layers_and_rest`."""
        return layers_and_rest(self.student)

    @cached_property
    def widths(self) -> Widths:
        return Widths.of(self.config)

    @property
    def head_trains(self) -> bool:
        """Return whether the head, or the embedding tied to it, gets a gradient."""
        shape = (self.widths.vocabulary, self.widths.hidden)
        return any(tuple(p.shape) == shape for p in trained(self.units[1]))

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype in which layers are gathered or copied; None for their own."""
        return AUTOCAST.get(self.precision)

    @property
    def reduced(self) -> torch.dtype | None:
        """Dtype in which gradients of sharded layers are reduced; None for the weights' own."""
        return torch.float32 if self.autocast else None

    @property
    def arithmetic(self) -> Arithmetic:
        stream = next(p for p in self.parameters if p.dim() > 1).element_size()
        return Arithmetic(stream, self.autocast.itemsize if self.autocast else stream)


def layers_and_rest(model: nn.Module) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the parameters of each decoder layer, and the other ones, as FSDP2 gathers them."""
    own: list[list[Tensor]] = [
        list(dict.fromkeys(p for m in inside for p in m.parameters(recurse=False)))
        for _, inside in shard_units(model)
    ]
    return own[:-1], own[-1]


def trained(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that get a gradient."""
    return [t for t in tensors if t.requires_grad]


def nbytes(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> int:
    """Return the bytes of whole tensors, in `dtype` or in their own."""
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors)
