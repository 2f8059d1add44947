"""Gradients of a step whose micro-batches Lightning sees as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from opd_lightning.types import RolloutBatch


def accumulating(
    closure: Callable[[], Any], later: Sequence[RolloutBatch], trainer: Trainer, batch_idx: int
) -> Callable[[], Any]:
    """Extend an optimiser's closure by the forward and backward passes of more micro-batches.

    Lightning accumulates gradients over a constant number of batches. If the number of
    micro-batches varies, a step is one batch: `closure` clears the gradients and runs the passes of
    its first micro-batch. Under DDP, gradients are exchanged in the last backward pass only.

    Args:
        closure: Lightning's, with the passes of the first micro-batch.
        later: The other micro-batches of the step, on the trainer's device.
        trainer: Its strategy runs the passes, under its precision and through its wrappers.
        batch_idx: Index of Lightning's batch.
    """
    if not later:
        return closure
    strategy = trainer.strategy

    @torch.enable_grad()
    def all_passes() -> Any:
        with _without_exchange(strategy):
            result = closure()
        *middle, last = later
        for batch in middle:
            with _without_exchange(strategy):
                one_pass(batch)
        one_pass(last)
        return result

    def one_pass(batch: RolloutBatch) -> None:
        loss = strategy.training_step(batch, batch_idx)
        strategy.backward(loss, trainer.optimizers[0])  # type: ignore[arg-type]

    return all_passes


def _without_exchange(strategy: Strategy) -> AbstractContextManager[None]:
    """Return a context in which backward passes only add to the gradients of this process."""
    if isinstance(strategy, ParallelStrategy):
        return strategy.block_backward_sync()
    return nullcontext()
