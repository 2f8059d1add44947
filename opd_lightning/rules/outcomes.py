"""Weights by rewards, and rewards spread over tokens by a teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, rate, step_mean, weighed, with_advantage


@dataclass(frozen=True)
class CompetenceWeight(Rule):
    """PACED (2603.11178): largest for prompts that the student solves about half of the time.

        w = p^alpha (1 - p)^beta,   p: mean reward of the prompt's samples

    Here p is that of the step's samples, the authors estimate it beforehand. A prompt without two
    scores has weight 0.

    Rates: value, the mean weight.

    Args:
        alpha: 0 or more; the authors use 1.
        beta: 0 or more; the authors use 1.
    """

    alpha: float = 1.0
    beta: float = 1.0

    needs_groups = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "alpha", 0 <= self.alpha < float("inf"), "a finite number of 0 or more")
        check(self, "beta", 0 <= self.beta < float("inf"), "a finite number of 0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        p = scored.batch.group_mean[:, None].to(signal.weight)
        factor = (p**self.alpha * (1 - p) ** self.beta).nan_to_num(0.0)
        return weighed(signal, factor), {"competence_weight/value": rate(scored, factor)}


@dataclass(frozen=True)
class RewardWeight(Rule):
    """Reward-weighted distillation (official code of TIP and PACED, `reward_beta`).

        w_i = N exp(R_i / temperature) / sum_j exp(R_j / temperature)   over the step's N rollouts

    A rollout without a score has weight 0 and is not counted.

    Rates: value, the weight relative to that of a reward of 1, before division by the mean.

    Args:
        temperature: beta of the code, above 0; 0.1 keeps little but the best rollouts, 10 is close
            to equal weights.
    """

    temperature: float

    needs_rewards = True
    step_wide = True
    divides = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "temperature", self.temperature > 0, "more than 0")

    def _raw(self, scored: Scored) -> Tensor:
        """Return `exp((R - 1) / temperature)`, `[B, 1]`; 0 without a score."""
        rewards = scored.batch.rewards[:, None].to(scored.student.logprobs)
        return ((rewards - 1) / self.temperature).exp().nan_to_num(0.0)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[1, 2]`: sum and number of the raw weights of scored, selected rollouts."""
        counted = signal.mask.any(dim=1) & ~scored.batch.rewards.isnan()
        raw = self._raw(scored)[counted].double()
        return torch.stack([raw.sum(), counted.sum().double()])[None]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        raw = self._raw(scored)
        factor = raw if observed is None else raw / step_mean(observed).to(raw)
        return weighed(signal, factor), {"reward_weight/value": rate(scored, raw)}


@dataclass(frozen=True)
class TeacherRatio(Rule):
    """Distilled RL (2607.17247): the teacher spreads a positive advantage over the tokens.

        A_t <- A_t r_t / (prod_s r_s)^(1 / T)   where A_t > 0,   r_t = clip(exp(d_t), low, high)

    The weights of a response have geometric mean 1 over its selected tokens, so its overall weight
    does not change. Negative advantages are kept: scaling them would penalise the teacher's
    preferred tokens most.

    Rates: clipped, tokens whose ratio is outside of the bounds.

    Args:
        low: Above 0; the authors use 1/3.
        high: At least `low`; the authors use 3.
    """

    low: float = 1 / 3
    high: float = 3.0

    needs = ("teacher",)
    sums_tokens = True
    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "low", 0 < self.low <= self.high, f"above 0, at most high ({self.high})")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ratio = scored.log_ratio.exp()
        log_ratio = ratio.clamp(self.low, self.high).log()
        tokens = signal.mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = torch.where(signal.mask, log_ratio, 0.0).sum(dim=1, keepdim=True) / tokens
        spread = signal.advantage * (log_ratio - mean).exp()
        clipped = (ratio < self.low) | (ratio > self.high)
        new = torch.where(signal.advantage > 0, spread, signal.advantage)
        return with_advantage(signal, new), {"teacher_ratio/clipped": rate(scored, clipped)}
