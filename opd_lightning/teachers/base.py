"""The teacher contract: a micro-batch in, scores of its sampled tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from opd_lightning.head import TokenStates
from opd_lightning.model_source import ModelSource
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.student import Student


class Teacher(ABC):
    """Scores sampled tokens without a gradient. It owns no optimiser.

    `source` is the model folder it comes from; None for one that is made of the student, whose
    folder it shares.
    """

    source: ModelSource | None = None

    @abstractmethod
    def load(self, device: torch.device, student: Student) -> None:
        """Make ready on `device`; called once, after every check and after the student's load."""

    @abstractmethod
    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        """Scores of the response tokens under one of `batch.views`."""

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - most have nothing to check
        """Raise UserError, before training, if some prompt is not its to score."""

    def parts(self) -> list[Teacher]:
        """Itself, or the teachers it is made of."""
        return [self]


class DistributionTeacher(Teacher):
    """A teacher in this process: its whole next-token distribution can be read."""

    @abstractmethod
    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Hidden states that predict the response tokens, with the head to read them."""


class Ask(NamedTuple):
    """A question: what does this teacher say about the response under this view?"""

    teacher: Teacher
    view: str
