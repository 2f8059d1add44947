"""Checks that a run can resume from a checkpoint, and notes on what differs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from opd_lightning.checkpoints.reading import Saved, Shape
from opd_lightning.errors import UserError, raised_by_all

# States of PyTorch's optimisers that may be no tensor: SGD's without momentum, earlier counts.
NO_TENSOR: dict[str, tuple[type, ...]] = {"momentum_buffer": (NoneType,), "step": (int, float)}


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Return the description of the run that is stored in its checkpoints."""
    return {
        "processes": trainer.world_size,
        "method": type(trainer.lightning_module).__name__,
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "schedulers": [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs],
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def check_readable(saved: Saved, trainer: Trainer, *, training: bool) -> None:
    """Refuse what the strategy cannot read, weights of another model, and weights alone.

    Raises:
        UserError: If the checkpoint is refused.
    """
    name = f"--ckpt_path: {str(saved.path)!r}"
    if saved.is_folder and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"{name} is a folder of shards, which trainer.strategy "
            f"{type(trainer.strategy).__name__} cannot read; continue with the one that wrote it "
            "(with save_distributed_checkpoint false it writes files, which every strategy reads)"
        )
    if training and not saved.resumable:
        raise UserError(
            f"{name} holds weights alone (save_weights_only), or lacks the state of the optimiser "
            "or the loops, without which the run would begin again at step 0 with later weights; "
            "name another, or start a new run from an exported student"
        )
    assert trainer.lightning_module is not None
    if difference := first_difference(saved.shapes, shapes_of(trainer.lightning_module)):
        raise UserError(
            f"{name} is not of this run's model: {difference}; continue with the config.yaml of "
            "the run that wrote it"
        )


def check_types(saved: Saved, trainer: Trainer) -> None:
    """Refuse the state of another type of optimiser or scheduler.

    A run may continue without the scheduler that it had, or with its first one.

    Raises:
        UserError: If the types differ; on all processes.
    """
    ours = provenance(trainer)
    for what, key in (("optimiser", "optimizers"), ("scheduler", "schedulers")):
        theirs = saved.written_by.get(key)
        if (
            theirs is None
            or theirs == ours[key]
            or (key == "schedulers" and not (theirs and ours[key]))
        ):
            continue
        error = UserError(
            f"--ckpt_path: {str(saved.path)!r} was written with {what} "
            f"{', '.join(map(str, theirs))}, got {', '.join(ours[key])}, whose state differs; "
            "continue with the same, or start a new run from an exported student"
        )
        raise raised_by_all(error)


def check_kinds(place: str, there: object, here: object, *, optional: bool = False) -> None:
    """Refuse a restored state with values of other kinds than the fresh one's.

    PyTorch's `load_state_dict` takes any, and fails in a later step. Keys of one side only are
    left out, as versions of PyTorch add and drop some.

    Args:
        place: Name of the state for messages.
        there: The restored state.
        here: The fresh state. None may become anything.
        optional: Whether every value may be None.

    Raises:
        TypeError: At the first value of another kind.
    """
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in here.keys() & there.keys() - {"params"}:  # names or numbers of weights
            check_kinds(f"{place}.{key}", there[key], here[key], optional=optional)
    elif isinstance(here, list | tuple) and isinstance(there, list | tuple):
        for i, (theirs, ours) in enumerate(zip(there, here, strict=False)):
            check_kinds(f"{place}.{i}", theirs, ours, optional=optional)
    elif here is None or (optional and there is None) or _kind(there) is _kind(here):
        return
    else:
        got, expected = (type(value).__name__ for value in (there, here))
        raise TypeError(f"{place}: got {got}, expected {expected}")


def check_shapes(state: Mapping[int, Mapping[str, Any]], optimizer: Optimizer) -> None:
    """Refuse moments of other shapes than their weights', and values that are no tensors.

    Only for optimisers of PyTorch whose tensors have the shapes of the weights, or 1 in the place
    of a size; others may factor them in any way.

    Args:
        state: The state of each weight, by its number.
        optimizer: The optimiser that it is restored to.

    Raises:
        ValueError: At the first tensor of another shape.
        TypeError: At the first other value.
    """
    if type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, LBFGS):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for number, weight in enumerate(weights):
            for name, value in state.get(number, {}).items():
                if name in NO_TENSOR and isinstance(value, NO_TENSOR[name]):
                    continue
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer.{number}.{name}: got {type(value).__name__}, expected a tensor"
                    )
                if value.numel() == 1:
                    continue
                sizes = zip(value.shape, weight.shape, strict=False)
                if value.dim() != weight.dim() or any(a not in (b, 1) for a, b in sizes):
                    raise ValueError(
                        f"optimizer.{number}.{name}: got shape {list(value.shape)}, expected "
                        f"{list(weight.shape)}"
                    )


def _kind(value: object) -> type:
    """Return the type of a value; numbers are of one kind, and lists and tuples."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float
    return list if isinstance(value, list | tuple) else type(value)


def differences(saved: Saved, trainer: Trainer) -> list[str]:
    """Return one line for each difference that does not prevent resumption."""
    lines = []
    if not saved.is_sealed:
        lines.append(
            f"{str(saved.path)!r} has no record of its own content: an earlier version wrote it, "
            "or it was changed since; it is taken as it is"
        )
    ours, theirs = provenance(trainer), saved.written_by
    if theirs.get("method", ours["method"]) != ours["method"]:
        lines.append(
            f"the checkpoint is of a run with {theirs['method']}, this one has {ours['method']}: "
            "weights, optimiser and place in the data are continued"
        )
    if theirs.get("processes", ours["processes"]) != ours["processes"]:
        wrote = theirs["processes"]
        lines.append(
            f"{wrote} process{'es' * (wrote > 1)} wrote the checkpoint, {ours['processes']} now: "
            "prompts, seeds and their order are the same; sums are made in another order, so "
            "losses are close and not equal bit for bit, and no process gets its random state back"
        )
    return lines


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def first_difference(there: Mapping[str, Shape], here: Mapping[str, Shape]) -> str | None:
    """Describe the first weight that is missing on one side or has another shape; else None."""
    for name in sorted(there.keys() | here.keys()):
        shapes = there.get(name), here.get(name)
        if shapes[0] != shapes[1]:
            sides = [f"of shape {list(s)}" if s is not None else "not" for s in shapes]
            return f"{name!r} is {sides[0]} there and {sides[1]} in this run"
    return None
