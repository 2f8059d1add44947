"""Interface of methods: their loss, their teachers and the properties that a run checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from opd_lightning.rules.base import Compare
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.training.scoring import asked_top_k
from opd_lightning.types import RolloutBatch


class Contract(ABC):
    """Interface of a method. Subclasses implement `loss` and override defaults that do not hold."""

    overlap_top_k: int

    # Hooks of a subclass ------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: RolloutBatch) -> Tensor:
        """Return the micro-batch's share of the step's loss; see `losses/reduction.py`."""

    def asks(self) -> Mapping[str, Ask]:
        """Return the teachers and the views they read, by the name of their scores."""
        return {}

    def all_asks(self) -> Mapping[str, Ask]:
        """Return `asks` of the method and of its parts."""
        return self.asks()

    def all_comparisons(self) -> Mapping[str, Compare]:
        """Return the functions of whole distributions of the method and its parts, by name."""
        return {}

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Raise UserError, before any weight is loaded, if the method's parts do not fit."""

    def prepare_step(self, batches: Sequence[RolloutBatch]) -> None:  # noqa: B027 - nor to prepare
        """Called with all micro-batches of a step, on the CPU, before training on the first."""

    def scores_ahead(self, step: int, micro_batches: int) -> bool:
        """Return whether `prepare_step` scores all micro-batches of a step but the first."""
        return False

    def loss_factor(self) -> float:
        """Return a factor of the step's loss, known after its last micro-batch. Collective."""
        return 1.0

    @property
    def needs_rewards(self) -> bool:
        """Return whether responses must be verified."""
        return self.needs_groups

    @property
    def needs_groups(self) -> bool:
        """Return whether rewards are compared between the responses to a prompt."""
        return False

    @property
    def sums_tokens(self) -> bool:
        """Return whether the method sums signals over the tokens of a response."""
        return False

    @property
    def needs_demonstrations(self) -> bool:
        """Return whether the method learns only from responses that the student did not write."""
        return False

    @property
    def takes_demonstrations(self) -> bool:
        """Return whether responses that the student did not write may be among the rollouts."""
        return True

    @property
    def corrects_staleness(self) -> bool:
        """Return whether the loss is correct on rollouts sampled by older student weights."""
        return False

    @property
    def averages_samples(self) -> bool:
        """Return whether the loss is a mean over sampled tokens, biased by a truncated sampler.

        So are policy gradients and estimates from sampled tokens, but not divergences between
        whole distributions.
        """
        return True

    # Derived properties -------------------------------------------------------------------

    def teachers(self) -> list[Teacher]:
        """Return the teachers of the method, without duplicates."""
        return list(dict.fromkeys(ask.teacher for ask in self.all_asks().values()))

    def teacher_parts(self) -> list[Teacher]:
        """Return the parts of all teachers, without duplicates."""
        return list(dict.fromkeys(part for one in self.teachers() for part in one.parts()))

    def compared_teachers(self) -> list[Teacher]:
        """Return the teachers whose distribution over the vocabulary is compared."""
        return []

    def asked_top_k(self) -> Mapping[str, int]:
        """Return the size of the top-k set requested of each teacher, by name in `all_asks`."""
        return asked_top_k(self.all_asks(), self.all_comparisons(), self.overlap_top_k)

    def views(self) -> set[str]:
        """Return the names of the prompt views that teachers read, "student" excluded."""
        return {ask.view for ask in self.all_asks().values()} - {"student"}
