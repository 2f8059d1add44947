"""Bytes of one process: exact for weights, gradients and the optimiser, estimates for the rest."""

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
    """What a process has on its device and when, in bytes, by name."""

    always: dict[str, int]
    training: dict[str, int]  # while micro-batches go forward and back
    moving: dict[str, int]  # while the optimiser moves the weights
    pushing: dict[str, int]  # while an engine, awake, is given them
    measuring: dict[str, int]  # while a validation reads texts, and engines are awake
    engine: dict[str, int]
    engine_sleeps: bool
    host: int  # in CPU memory, where the device is a GPU

    def fullest(self) -> dict[str, int]:
        """The parts at the moment that takes most."""
        asleep = (self.training, self.moving)
        awake = (self.pushing, self.measuring)
        if self.engine_sleeps:
            return self.always | max(*asleep, *(self.engine | part for part in awake), key=_sum)
        return self.always | self.engine | max(*asleep, *awake, key=_sum)


def process_memory(plan: Plan) -> Memory:
    """Of the process that holds most; for the longest responses."""
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
    shared = {id(parameter) for parameter in parameters}  # by a teacher: the student's
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
    comes_and_goes = plan.on_gpu and layout.shards == 1
    return Memory(
        always={**always, "teachers": teachers, "start": 0 if comes_and_goes else start},
        training={**training, "passing_teachers": passing},
        moving={"update": _update_bytes(parameters, plan.optimizer, layout, plan.on_gpu)},
        pushing={"push": _push_bytes(plan)},
        measuring={"start": start} if comes_and_goes else {},
        engine={"engine": plan.engine},
        engine_sleeps=plan.engine_sleeps,
        host=host + (start if comes_and_goes else 0),
    )


def student_bytes(
    parameters: Iterable[Tensor], optimizer: Optimizer, layout: Layout = WHOLE
) -> dict[str, int]:
    """Exactly: weights W, gradients G of those that train, and the optimiser's states.

    States are `c` copies of G in its dtype: 2 for Adam and its kin (3 with amsgrad), which also
    count steps in one float32 a tensor; 1 for a momentum; else 0.
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
    """Of tensors that every process holds its part of."""
    return sum(layout.part(t.shape) * t.element_size() for t in tensors)


def passing_bytes(plan: Plan) -> dict[str, int]:
    """What comes and goes with the student's passes; an estimate.

    Sharded, what is no layer is whole through a micro-batch and its gradients until they are
    scattered, in a second buffer. Of the layers two are whole at a time, and the gradients of
    one, which travel in float32. Not sharded, autocast copies the matrices of the layers.
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
    # Checkpointing forgets the copies of what is frozen; autocast remembers those that train.
    kept = [p for layer in layers for p in (trained(layer) if plan.checkpointing else layer)]
    wide = [p for p in kept if p.dim() > 1 and p.element_size() == 4]
    return {"autocast_copies": nbytes(wide, plan.autocast) if plan.autocast else 0}


def gathered_bytes(model: nn.Module, layout: Layout) -> int:
    """What of a sharded teacher is whole from its first question to the optimiser's step."""
    layers, rest = layers_and_rest(model)
    return nbytes(rest) + 2 * max(map(nbytes, layers)) if layout.shards > 1 else 0


def _update_bytes(
    parameters: list[Tensor], optimizer: Optimizer, layout: Layout, on_gpu: bool
) -> int:
    """Adam's square roots: of all weights at once on a GPU, one after the other elsewhere.

    Its fused kernel makes none.
    """
    if "betas" not in optimizer.defaults or optimizer.defaults.get("fused"):
        return 0
    sizes = [held_bytes([p], layout) for p in trained(parameters)]
    return sum(sizes) if on_gpu else max(sizes, default=0)


def _push_bytes(plan: Plan) -> int:
    """The largest tensor of a push, of which there is one at a time; an estimate.

    It is whole, which it is anyway where nothing is sharded, and copied once in the engine's
    dtype: for the proof by sums, or by vLLM, which fills a new layer before it takes the old one's
    place.
    """
    if plan.pushed is None:
        return 0
    largest = max(plan.parameters, key=Tensor.numel)
    gathered = nbytes([largest]) if plan.layout.shards > 1 else 0
    return gathered + nbytes([largest], plan.pushed)


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())
