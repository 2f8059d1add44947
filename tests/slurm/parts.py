"""Classes for the runs of jobs, named in their YAML."""

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
    """OPD that draws from every global generator in training, as dropout does from torch's."""

    def loss(self, batch: RolloutBatch) -> Tensor:
        noise = float(torch.rand(())) + np.random.random() + random.random()
        return super().loss(batch) * (1 + noise)


class Pause(Callback):
    """Waits once per job, over all its starts, so that the test can act.

    Args:
        hook: Hook in which it waits.
        step: Optimiser step at which it waits.
        seconds: Duration.
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
