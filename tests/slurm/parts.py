"""Parts of the runs that jobs make, named in their YAML."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from opd_lightning.methods import OPD
from opd_lightning.types import RolloutBatch


class NoisyOPD(OPD):
    """Draws from every global generator while it learns, as dropout draws from torch's."""

    def loss(self, batch: RolloutBatch) -> Tensor:
        noise = float(torch.rand(())) + np.random.random() + random.random()
        return super().loss(batch) * (1 + noise)


class Pause(Callback):
    """Waits once in a job's life, however often it starts, for the test to do something to it.

    Args:
        hook: The callback's hook to wait in.
        step: Optimiser steps made by then.
        seconds: How long.
    """

    def __init__(self, hook: str, step: int, seconds: float) -> None:
        self.step = step
        self.seconds = seconds
        setattr(self, hook, self._wait)

    def _wait(self, trainer: Any, *_: Any, **__: Any) -> None:
        note = Path(f"waits-{trainer.global_rank}")
        if trainer.global_step == self.step and not note.exists():
            note.write_text(str(os.getpid()))
            time.sleep(self.seconds)
