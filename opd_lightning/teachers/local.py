"""Base classes of teachers in this process, which read a model without a gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from opd_lightning.models.causal_lm import Reader
from opd_lightning.models.head import TokenStates, score
from opd_lightning.models.sharding import Sharding, reshard
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.types import RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class LocalTeacher(DistributionTeacher):
    """Teacher that reads a causal LM in this process."""

    @abstractmethod
    def _read(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Run the model and return its states."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Autocast dtype; None disables autocast, which is meant for the student."""
        return None

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        device_type, dtype = batch.response_ids.device.type, self.compute_dtype
        with torch.no_grad(), torch.autocast(device_type, dtype, enabled=dtype is not None):
            return self._read(batch, view)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        states = self.states(batch, view)
        targets = batch.response_ids[batch.response_mask]
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            return TokenScores.unflatten(score(states, targets, top_k=top_k).student, batch)


class OwnModelTeacher(LocalTeacher):
    """Teacher with a model separate from the student's, sharded if the student is.

    Not an `nn.Module`, so that Lightning neither trains nor checkpoints it.
    """

    _reader: Reader | None = None
    _sharding: Sharding | None = None

    @abstractmethod
    def describe(self, student: Student) -> None:
        """Build the model on the meta device, instead of loading it; config.json is enough."""

    def model(self) -> Any:
        """The causal LM, loaded or described."""
        assert self._reader is not None
        return self._reader.model

    @property
    def is_collective(self) -> bool:
        return self._sharding is not None

    def release(self) -> None:
        if self._sharding is not None:
            assert self._reader is not None
            reshard(self._reader)

    def _read(self, batch: RolloutBatch, view: str) -> TokenStates:
        assert self._reader is not None
        states: TokenStates = self._reader(batch, view)
        return states
