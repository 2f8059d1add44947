"""Bytes of one process: exact for weights, gradients and optimiser, estimates for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning.preflight.activations import activation_bytes, head_bytes
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.plan import Plan, layers_and_rest, nbytes, trained

WHOLE = Layout()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a process's device by name, grouped by when they are needed."""

    always: dict[str, int]
    training: dict[str, int]  # during forward and backward passes
    optimizer_step: dict[str, int]  # while the optimiser updates the weights
    pushing: dict[str, int]  # while weights are pushed to an engine, which is awake
    validation: dict[str, int]  # while a validation reads texts, and engines are awake
    engine: dict[str, int]
    engine_sleeps: bool
    host: int  # in CPU memory, if the device is a GPU

    def peak(self) -> dict[str, int]:
        """Return the parts at the moment of peak use."""
        asleep = (self.training, self.optimizer_step)
        awake = (self.pushing, self.validation)
        if self.engine_sleeps:
            return self.always | max(*asleep, *(self.engine | part for part in awake), key=_sum)
        return self.always | self.engine | max(*asleep, *awake, key=_sum)


def process_memory(plan: Plan) -> Memory:
    """Estimate the memory of the process that holds most, for the longest responses."""
    parameters, layout = plan.parameters, plan.layout
    always = student_bytes(parameters, plan.optimizer, layout)
    always["ddp_buckets"] = always["gradients"] if layout.copies_gradients else 0
    training = passing_bytes(plan) | {
        "activations": activation_bytes(
            plan.widths, plan.rows, plan.length, plan.arithmetic, checkpointing=plan.checkpointing
        ),
        "head": head_bytes(
            plan.widths,
            plan.rows * plan.response,
            plan.arithmetic,
            on_gpu=plan.on_gpu,
            trains=plan.head_trains,
        ),
    }
    shared = {id(parameter) for parameter in parameters}  # teachers may share the student's
    teachers = passing = host = 0
    for model, sharded, offloaded in plan.teachers:
        own = [p for p in model.parameters() if id(p) not in shared]
        size = held_bytes(own, layout if sharded else WHOLE)
        if offloaded and plan.on_gpu:
            passing, host = passing + size, host + size
        else:
            teachers += size
        if sharded:
            passing += gathered_bytes(model, layout)
    start = held_bytes(parameters, layout) if plan.compares_with_start else 0
    if plan.demonstrator:
        always["demonstrators_engine"] = plan.demonstrator
    comes_and_goes = plan.on_gpu and layout.shards == 1
    return Memory(
        always={**always, "teachers": teachers, "start": 0 if comes_and_goes else start},
        training={**training, "passing_teachers": passing},
        optimizer_step={"update": _update_bytes(parameters, plan.optimizer, layout, plan.on_gpu)},
        pushing={"push": _push_bytes(plan)},
        validation={"start": start} if comes_and_goes else {},
        engine={"engine": plan.engine},
        engine_sleeps=plan.engine_sleeps,
        host=host + (start if comes_and_goes else 0),
    )


def student_bytes(
    parameters: Iterable[Tensor], optimizer: Optimizer, layout: Layout = WHOLE
) -> dict[str, int]:
    """Compute exact bytes: weights, gradients G of trainable ones, and optimiser states.

    States are `c` copies of G in its dtype: 2 for Adam and similar (3 with amsgrad), which also
    count steps in one float32 per tensor; 1 for a momentum; else 0.
    """
    tensors = list(parameters)
    learning = trained(tensors)
    defaults: dict[str, Any] = optimizer.defaults
    adam = "betas" in defaults
    copies = 2 + bool(defaults.get("amsgrad")) if adam else int(bool(defaults.get("momentum")))
    gradients = held_bytes(learning, layout)
    counters = 4 * len(learning) if adam else 0
    return {
        "weights": held_bytes(tensors, layout),
        "gradients": gradients,
        "optimizer": copies * gradients + counters,
    }


def held_bytes(tensors: Iterable[Tensor], layout: Layout = WHOLE) -> int:
    """Return the bytes of one process's part of tensors that all processes share."""
    return sum(layout.part(t.shape) * t.element_size() for t in tensors)


def passing_bytes(plan: Plan) -> dict[str, int]:
    """Estimate the temporary bytes of the student's passes.

    Sharded: parameters outside of layers are gathered for a micro-batch, and their gradients until
    they are scattered, in a second buffer. Two layers are gathered at a time, and the gradients of
    one, which are sent in float32. Not sharded: autocast copies the matrices of the layers.
    """
    layers, rest = plan.units
    if plan.layout.shards > 1:
        largest = max(layers, key=nbytes)
        learning = trained(largest)
        sent = nbytes(learning, plan.autocast) + nbytes(learning, plan.reduced)
        return {
            "gathered": nbytes(rest) + 2 * nbytes(largest, plan.autocast),
            "gathered_gradients": 2 * nbytes(trained(rest)) + sent,
        }
    # Checkpointing discards copies of frozen weights; autocast caches those that train.
    kept = [p for layer in layers for p in (trained(layer) if plan.checkpointing else layer)]
    wide = [p for p in kept if p.dim() > 1 and p.element_size() == 4]
    return {"autocast_copies": nbytes(wide, plan.autocast) if plan.autocast else 0}


def gathered_bytes(model: nn.Module, layout: Layout) -> int:
    """Return the gathered bytes of a sharded teacher, from its first use to the optimiser step."""
    layers, rest = layers_and_rest(model)
    return nbytes(rest) + 2 * max(map(nbytes, layers)) if layout.shards > 1 else 0


def _update_bytes(
    parameters: list[Tensor], optimizer: Optimizer, layout: Layout, on_gpu: bool
) -> int:
    """Return the bytes of Adam's square roots: of all weights on a GPU, of one elsewhere.

    Its fused kernel makes none.
    """
    if "betas" not in optimizer.defaults or optimizer.defaults.get("fused"):
        return 0
    sizes = [held_bytes([p], layout) for p in trained(parameters)]
    return sum(sizes) if on_gpu else max(sizes, default=0)


def _push_bytes(plan: Plan) -> int:
    """Estimate the bytes of a push: its largest tensor, since there is one at a time.

    If sharded, the tensor is gathered. It is copied once in the engine's dtype: for the proof by
    sums, or by vLLM, which fills a new layer before it replaces the old one.
    """
    if plan.pushed is None:
        return 0
    largest = max(plan.parameters, key=Tensor.numel)
    gathered = nbytes([largest]) if plan.layout.shards > 1 else 0
    return gathered + nbytes([largest], plan.pushed)


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())
