"""Checks of the Trainer, the optimiser and the size of a step, before weights load."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

# Lightning's callbacks that change the step or the trained weights, and replacements.
REFUSED_CALLBACKS = {
    WeightAveraging: (
        "it puts averaged weights into the student, which the engine does not have; use "
        "model.teacher EMATeacher with callbacks.EMATeacherUpdate for an averaged teacher"
    ),
    StochasticWeightAveraging: (
        "it averages weights over the last epochs, and runs are measured in steps; average "
        "exported students, or use callbacks.EMATeacherUpdate"
    ),
    GradientAccumulationScheduler: (
        "it changes the micro-batches of a step during the run, but the stream makes them in "
        "advance; set trainer.accumulate_grad_batches"
    ),
}

# These keep weights and batches in float32; others would also cast log-probs and rewards.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_step_size(trainer: Trainer, data: RolloutDataModule) -> None:
    """Check that a step divides into ranks and micro-batches."""
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    if parts > 1 and data.max_tokens_per_micro_batch is not None:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {parts} and data.max_tokens_per_micro_batch "
            f"{data.max_tokens_per_micro_batch}, which decides the number of micro-batches; leave "
            "one of them out"
        )
    if data.prompts_per_step % world:
        raise UserError(
            f"data.prompts_per_step: got {data.prompts_per_step} for {world} processes, "
            "expected a multiple of their number"
        )
    share = data.prompts_per_step // world
    # Worst case: one rank has all prompts that the student does not answer, one response each.
    others = share if data.mix.whole_steps else min(share, sum(data.mix.counts(share * world)))
    rollouts = (share - others) * data.samples_per_prompt + others
    if rollouts < parts:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {parts} for {rollouts} rollouts a step per "
            "process, expected at most one micro-batch per rollout; lower it or raise "
            "data.prompts_per_step"
        )


def check_trainer(trainer: Trainer) -> None:
    """Check settings of Lightning's Trainer that would break the loss or the checkpoints."""
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision: got {trainer.precision!r}, expected one of "
            f"{', '.join(PRECISIONS)}; for weights in bfloat16 set student.dtype"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: got {type(callback).__name__}: {reason}")
    parts = trainer.accumulate_grad_batches
    every = getattr(trainer, "val_check_interval", None)  # Lightning does not set it for a time
    if every is None and (parts > 1 or trainer.world_size > 1):
        raise UserError(
            f"trainer.val_check_interval: got a time with accumulate_grad_batches {parts} on "
            f"{trainer.world_size} processes, expected a number of micro-batches; processes "
            "cannot agree on a time, and it may pass inside a step"
        )
    if isinstance(every, int) and every % parts:
        raise UserError(
            f"trainer.val_check_interval: got {every} micro-batches for "
            f"accumulate_grad_batches {parts}, expected a multiple, so that validation and "
            "checkpoints fall between optimiser steps"
        )


def check_optimizer(module: DistillationModule) -> None:
    """Build optimiser and scheduler on a stand-in of the weights, so that mistakes show early."""
    # A matrix, as in LoRA; every optimiser accepts it.
    stand_in = [torch.nn.Parameter(torch.zeros(2, 2))]
    name = "optimizer"
    try:
        optimizer = module.optimizer(stand_in)
        for option, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"model.optimizer.{option}: got {value}, expected a finite number")
        if module.lr_scheduler is None:
            return
        name = "lr_scheduler"
        scheduler = module.lr_scheduler(optimizer)
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"model.{name}: {error}; correct its settings") from error
    except RuntimeError:  # such as an optimiser for GPUs only; the stand-in is on the CPU
        return
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(
            f"model.lr_scheduler: got {type(scheduler).__name__}, which waits for a metric, but "
            "schedulers are stepped after every optimiser step without one; use one that is a "
            "function of the step, such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # the optimiser was not stepped before it
            scheduler.step()
    except ArithmeticError as error:
        raise UserError(
            f"model.lr_scheduler: {type(scheduler).__name__} has no learning rate after step 1 "
            f"({error}); correct its settings"
        ) from error
