"""The teacher contract: a micro-batch in, scores of its sampled tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from opd_lightning.head import TokenStates
from opd_lightning.model_source import ModelSource
from opd_lightning.types import RolloutBatch, TokenScores


class Teacher(ABC):
    """Scores sampled tokens without a gradient. It owns no optimiser and is in no checkpoint."""

    source: ModelSource

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Make ready on `device`; called once, after every check of the configuration."""

    @abstractmethod
    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        """Scores of the response tokens under one of `batch.views`."""


class DistributionTeacher(Teacher):
    """A teacher in this process: its whole next-token distribution can be read."""

    @abstractmethod
    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Hidden states that predict the response tokens, with the head to read them."""
