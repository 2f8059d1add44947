"""What teachers in this process share: a model, read without a gradient."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from opd_lightning.causal_lm import response_states
from opd_lightning.head import TokenStates, score
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.types import RolloutBatch, TokenScores


class LocalTeacher(DistributionTeacher):
    """Reads `model()`, a causal LM in this process."""

    @abstractmethod
    def model(self) -> Any:
        """The loaded causal LM."""

    def _reading(self) -> AbstractContextManager[Any]:
        """How the model must be while it is read."""
        return nullcontext()

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        # Autocast is the student's business: a teacher answers in its own dtype.
        device_type = batch.response_ids.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False), self._reading():
            return response_states(self.model(), batch, view)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        states = self.states(batch, view)
        targets = batch.response_ids[batch.response_mask]
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            return TokenScores.unflatten(score(states, targets, top_k=top_k).student, batch)
