"""State of the global random generators in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from opd_lightning.checkpoints import restoring
from opd_lightning.processes import Ranks
from opd_lightning.training.callback import RunCallback

State = dict[str, Any]


class RngState(RunCallback):
    """Saves the global generators of every rank (Python, NumPy, torch, CUDA) in checkpoints.

    For models and methods that use them in training, for example for dropout or noise in a loss.
    Rollouts are seeded separately and do not need it.

    A step begins with the generator state at the end of the previous one, in resumed and
    uninterrupted runs alike. Draws in between (by a validation, a new epoch's iterator, the start
    of the program) have no effect. With a different number of ranks nothing is restored, and the
    trainer reports it.
    """

    def __init__(self) -> None:
        self._resumed: list[State] | None = None
        self._begin: State = {}  # state at the start of the current or next step
        self._step = 0

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("rng_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        self._step, self._begin = trainer.global_step, current(device)
        states, self._resumed = self._resumed, None
        with restoring("the states of the random generators"):
            if states is not None and len(states) == trainer.world_size:
                restore(states[trainer.global_rank], device)
                self._begin = states[trainer.global_rank]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            restore(self._begin, trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step, self._begin = trainer.global_step, current(trainer.strategy.root_device)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._begin:
            checkpoint["rng_states"] = Ranks.of(trainer).gather(self._begin)
        elif self._resumed is not None:  # a finished run that repeats its last validation
            checkpoint["rng_states"] = self._resumed


def current(device: torch.device) -> State:
    """Return the generator states of this process and, for CUDA, of `device`."""
    numbers: Any = np.random.get_state()
    name, keys, *rest = numbers
    state: State = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: State, device: torch.device) -> None:
    """Restore the generator states that `current` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
