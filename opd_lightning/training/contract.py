"""What a method says about itself: what it computes, whom it asks, what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from opd_lightning.rules.base import Compare
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.scoring import asked_top_k
from opd_lightning.types import RolloutBatch


class Contract(ABC):
    """A method writes `loss`, and overrides what is not true of it."""

    overlap_top_k: int

    # What a method writes -----------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: RolloutBatch) -> Tensor:
        """This micro-batch's share of the step's loss; see `losses/reduction.py`."""

    def asks(self) -> Mapping[str, Ask]:
        """Whom the method asks, under which view, by the name it knows the answer by."""
        return {}

    def all_asks(self) -> Mapping[str, Ask]:
        """`asks`, and those of its parts."""
        return self.asks()

    def all_comparisons(self) -> Mapping[str, Compare]:
        """Functions of whole distributions that are read, by name."""
        return {}

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Raise UserError, before any weight is loaded, if the method's parts do not fit."""

    def prepare_step(self, batches: Sequence[RolloutBatch]) -> None:  # noqa: B027 - nor to prepare
        """See all of a step's micro-batches, on the CPU, before the first of them is trained on."""

    @property
    def needs_rewards(self) -> bool:
        """Whether responses must be verified."""
        return self.needs_groups

    @property
    def needs_groups(self) -> bool:
        """Whether rewards are compared between the responses to a prompt."""
        return False

    @property
    def sums_tokens(self) -> bool:
        """Whether it adds up the signals of a response's tokens."""
        return False

    @property
    def needs_demonstrations(self) -> bool:
        """Whether responses that the student did not write are all there is to learn from."""
        return False

    @property
    def takes_demonstrations(self) -> bool:
        """Whether responses that the student did not write may be among the rollouts."""
        return True

    @property
    def corrects_staleness(self) -> bool:
        """Whether the loss is right on rollouts that older weights of the student sampled."""
        return False

    # What others may ask ------------------------------------------------------------------

    def teachers(self) -> list[Teacher]:
        """Every teacher that the method asks, each once."""
        return list(dict.fromkeys(ask.teacher for ask in self.all_asks().values()))

    def compared_teachers(self) -> list[Teacher]:
        """Those whose whole distribution is compared, token by token of the vocabulary."""
        return []

    def asked_top_k(self) -> Mapping[str, int]:
        """How many of its likeliest tokens everybody is asked for, by the names of `all_asks`."""
        return asked_top_k(self.all_asks(), self.all_comparisons(), self.overlap_top_k)

    def views(self) -> set[str]:
        """Names of the prompt views that are read, besides the student's own."""
        return {ask.view for ask in self.all_asks().values()} - {"student"}
