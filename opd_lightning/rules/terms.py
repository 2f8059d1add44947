"""Terms: additional losses with their own gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import ForwardKL, ReverseKL, kl
from opd_lightning.losses.estimators import k2, k3
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.losses.top_k import TopK
from opd_lightning.rules.base import Compare, Scored, names_compared
from opd_lightning.rules.common import is_correct, is_wrong
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.types import TokenScores

CORRECT = 0.5  # score from which a rollout is correct


class Term(ABC):
    """Additional loss on the response tokens of the method's own loss, masked by rules or not.

    A row without a view that the term reads is left out of the term, and of nothing else.
    `name`, unique among a run's terms, is the key of its asks, comparisons and logged metrics.
    """

    name: str
    reads_entropy = False  # reads the entropy of the teacher's full distribution
    needs_rewards = False  # reads rewards

    @property
    def averages_samples(self) -> bool:
        """Return whether it is a mean over sampled tokens, biased by a truncated sampler."""
        return True

    def asks(self) -> Mapping[str, Ask]:
        """Return further models whose scores the term reads, by name."""
        return {}

    def comparisons(self) -> Mapping[str, Compare]:
        """Return the comparisons of full distributions that the term reads, by name."""
        return {}

    def names_read(self) -> set[str]:
        """Return the names of the models whose scores or distributions the term reads."""
        teacher = {"teacher"} if self.reads_entropy else set()
        return {*self.asks(), *names_compared(self.comparisons()), *teacher}

    @abstractmethod
    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Return `[B, R]` nats. The gradient flows through `student.logprobs` and `values`."""


class TrustRegion(Term):
    """KL penalty to a reference model: `coefficient * KL(pi_theta || pi_ref)` per prefix.

    EDGE-OPD (2605.23493) uses 0.05 with the frozen start as reference, Stable-OPD (2604.08527) the
    initial student; neither publishes its estimator.

    Args:
        reference: Reference model.
        coefficient: Weight of the divergence; a schedule anneals it (KDRL, 2506.02208).
        estimator: "k2" and "k3" read only the sampled tokens. The gradient of k2 is that of the
            reverse KL, of k3 that of the forward KL. "full" is the KL itself.
        name: Name of the logged metrics; two trust regions need two names.
        view: Prompt view that the reference reads; "student" is the student's own prompt.
        direction: Of "full": "reverse" is KL(pi_theta || pi_ref), "forward" KL(pi_ref || pi_theta).
        rollouts: Rollouts that are penalised: "correct" ones score 0.5 or more, "wrong" ones less.
            KDRL has a variant that spares correct ones. The normaliser counts all of them.
    """

    def __init__(
        self,
        reference: Teacher,
        coefficient: float | Schedule = 0.05,
        estimator: Literal["k2", "k3", "full"] = "k2",
        name: str = "trust_region",
        view: str = "student",
        direction: Literal["reverse", "forward"] = "reverse",
        rollouts: Literal["all", "correct", "wrong"] = "all",
    ) -> None:
        if direction == "forward" and estimator != "full":
            raise UserError(
                f"TrustRegion.direction: got 'forward' with the estimator {estimator!r}, expected "
                "'full'; of the others, k3 has the gradient of the forward KL"
            )
        self.name = name
        self.view = view
        self.direction = direction
        self.rollouts = rollouts
        self.reference = reference
        self.coefficient = coefficient
        self.estimator = estimator

    @property
    def averages_samples(self) -> bool:
        return self.estimator != "full"

    @property
    def needs_rewards(self) -> bool:  # type: ignore[override]
        return self.rollouts != "all"

    def asks(self) -> Mapping[str, Ask]:
        return {self.name: Ask(self.reference, self.view)}

    def comparisons(self) -> Mapping[str, Compare]:
        if self.estimator != "full":
            return {}
        divergence = ReverseKL() if self.direction == "reverse" else ForwardKL()
        return {self.name: Compare(self.name, divergence)}

    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        coefficient = value_at(self.coefficient, scored.batch.totals.step)
        if self.estimator == "full":
            loss = coefficient * values[self.name]
        else:
            estimate = k2 if self.estimator == "k2" else k3
            loss = coefficient * estimate(student.logprobs, scored.others[self.name].logprobs)
        if self.rollouts == "all":
            return loss
        chosen = is_correct if self.rollouts == "correct" else is_wrong
        return torch.where(chosen(scored, CORRECT), loss, 0.0)


class EntropyBonus(Term):
    """Entropy bonus of the student: `-coefficient * H(pi_theta)` over the whole vocabulary.

    Args:
        coefficient: Weight; the default is ours, small compared to token losses of about 0.1.
    """

    name = "entropy_bonus"
    averages_samples = False

    def __init__(self, coefficient: float = 1e-3) -> None:
        self.coefficient = coefficient

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.name: Compare(None, _negative_entropy)}

    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        return self.coefficient * values[self.name]


class EntropyGatedForwardKL(Term):
    """EOPD (2603.07079): the teacher's forward KL at tokens of high teacher entropy.

        1[H(pi_T) > threshold] * sum_{v in top-k of T} T'(v) (log T'(v) - log S(v))

    T' is the teacher renormalised on its top-k, S the student's full softmax. Additive: the
    method's own loss stays on these tokens.

    Args:
        threshold: Threshold of the teacher's full entropy, nats.
        top_k: Size of the support.
    """

    name = "entropy_gated_forward_kl"
    reads_entropy = True
    averages_samples = False

    def __init__(self, threshold: float = 0.8, top_k: int = 16) -> None:
        if top_k < 1:
            raise UserError(f"EntropyGatedForwardKL.top_k: got {top_k}, expected at least 1")
        self.threshold = threshold
        self.divergence = TopK(
            k=top_k, support="teacher", normalise="teacher", divergence="forward"
        )

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.name: Compare("teacher", self.divergence)}

    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        unsure = scored.teacher.entropy > self.threshold
        return torch.where(unsure, values[self.name], 0.0)


def _negative_entropy(student_logprobs: Tensor, _: Tensor | None) -> Tensor:
    return kl(student_logprobs, torch.zeros_like(student_logprobs))
