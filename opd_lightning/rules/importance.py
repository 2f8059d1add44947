"""Importance weights, which correct for the difference between the engine's and trainer's policy.

    w = pi_theta(y) / mu(y), detached, a factor on the token's loss

pi_theta is the trainer's policy at this step. mu is the engine's: other kernels, perhaps another
precision and, with data.max_staleness 1, weights that are one optimiser step old. A ratio per token
corrects the distribution of that token given its prefix; prefixes keep mu's distribution. The
product over a response corrects both.

Applied only to rows that the student sampled under its own prompt. Others (guided, from a teacher,
recorded) are off-policy by design and keep weight 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, rate, step_mean, weighed

BOUND = 20.0  # nats; bound of a log-ratio before it is exponentiated (as in verl)


def log_importance(scored: Scored) -> Tensor:
    """Return `log pi_theta(y_t) - log mu(y_t)`, `[B, R]` nats; 0 off-policy and on padding.

    mu is the truncated distribution where the sampler truncates; pi_theta is whole.
    """
    return _minus_behaviour(scored, scored.student.logprobs)


def log_drift(scored: Scored) -> Tensor:
    """Return `log_importance` with pi_theta truncated as mu is: 0 where the policies are equal."""
    return _minus_behaviour(scored, scored.student.sampled_logprobs)


def _minus_behaviour(scored: Scored, logprobs: Tensor) -> Tensor:
    batch = scored.batch
    ours = batch.response_mask & batch.on_policy[:, None]
    return torch.where(ours, logprobs - batch.behaviour_logprobs, 0.0)


def bounded_exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-BOUND, BOUND).exp()


@dataclass(frozen=True)
class TruncatedImportance(Rule):
    """Truncated importance sampling, `w <- min(w, cap)`, as in verl and TRL.

    Rates: weight, its mean; truncated, tokens whose ratio exceeded the cap.

    Args:
        level: "token": a ratio for each token; "sequence": the product of all ratios of a
            response, on each of its tokens.
        cap: Above 0. G-OPD and SG-OPD use 5 at token level; SDPO and TRL use 2.
        unit_mean: Divide by the mean weight of the step, over selected on-policy tokens at token
            level and over their rollouts at sequence level. Costs the student one more
            forward pass of all micro-batches but the first; off, as in verl.
    """

    corrects_sampler = True
    ignores_weights = True

    level: Literal["token", "sequence"] = "token"
    cap: float = 5.0
    unit_mean: bool = False

    def __post_init__(self) -> None:
        check(self, "cap", self.cap > 0, "more than 0")

    @property
    def step_wide(self) -> bool:
        return self.unit_mean

    def _ratio(self, scored: Scored) -> Tensor:
        """Return the ratios, `[B, R]`, or `[B, 1]` at sequence level."""
        log_weight = log_importance(scored)
        if self.level == "sequence":
            log_weight = log_weight.sum(dim=1, keepdim=True)
        return bounded_exp(log_weight)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[1, 2]`: the sum and the number of the on-policy weights."""
        weight = self._ratio(scored).clamp(max=self.cap).double()
        counted = signal.mask & scored.batch.on_policy[:, None]
        if self.level == "sequence":
            counted = counted.any(dim=1, keepdim=True)
        return torch.stack([weight[counted].sum(), counted.sum().double()])[None]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ratio = self._ratio(scored)
        weight = ratio.clamp(max=self.cap)
        if self.unit_mean:
            weight = weight / step_mean(observed).to(weight)
        weight = torch.where(scored.batch.on_policy[:, None], weight, 1.0)
        return weighed(signal, weight), {
            "importance/weight": rate(scored, weight),
            "importance/truncated": rate(scored, ratio > self.cap),
        }


@dataclass(frozen=True)
class IcePop(Rule):
    """IcePop (Ling team, 2510.18855): the ratio within a range, 0 outside.

        w_t <- w_t 1[low <= w_t <= high]

    A dropped token still counts in the loss's normaliser.

    Rates: weight, its mean; dropped.

    Args:
        low: Above 0; the authors use 0.5.
        high: 1 or more; the authors use 5.
    """

    corrects_sampler = True
    ignores_weights = True

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        check(self, "low", 0 < self.low <= 1, "a number in (0, 1]")
        check(self, "high", self.high >= 1, "1 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ratio = bounded_exp(log_importance(scored))
        inside = (self.low <= ratio) & (ratio <= self.high)
        weight = torch.where(inside, ratio, 0.0)
        return weighed(signal, weight), {
            "ice_pop/weight": rate(scored, weight),
            "ice_pop/dropped": rate(scored, ~inside),
        }


@dataclass(frozen=True)
class DriftGate(Rule):
    """Blockwise policy-drift gate (2606.24084, equation 1; from secondary sources).

        g_b = exp(-strength |mean over block b of log pi_theta(y_t) - log mu(y_t)|)

    divided by its mean over the step's selected tokens. A block is `block` consecutive selected
    tokens; others are not counted. pi_theta is truncated as mu is. It acts where rollouts are older
    than the student (`data.max_staleness` 1), and weighs all tokens alike where they are not and
    engine and trainer agree. It does not correct for the sampler. Rows of other samplers have g 1.

    Rates: value, the mean of g before division.

    Args:
        strength: tau of the paper, 0 or more; its value is not known here.
        block: Tokens of a block; the authors use 64.
    """

    strength: float
    block: int = 64

    step_wide = True
    divides = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "strength", 0 <= self.strength < float("inf"), "a finite number of 0 or more")
        check(self, "block", self.block >= 1, "1 or more")

    def _raw(self, signal: Signal, scored: Scored) -> Tensor:
        """Return g, `[B, R]`; 1 without selected tokens."""
        drift = torch.where(signal.mask, log_drift(scored), 0.0)
        place = (signal.mask.cumsum(dim=1) - 1).clamp(min=0) // self.block  # block of each token
        blocks = int(place.max()) + 1 if place.numel() else 1
        empty = drift.new_zeros(len(drift), blocks)
        total = empty.scatter_add(1, place, drift)
        count = empty.scatter_add(1, place, signal.mask.to(drift)).clamp(min=1)
        return (-self.strength * (total / count).abs()).exp().gather(1, place)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[1, 2]`: the sum of g over the selected tokens, and their number."""
        raw = self._raw(signal, scored)[signal.mask].double()
        return torch.stack([raw.sum(), signal.mask.sum().double()])[None]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        raw = self._raw(signal, scored)
        factor = raw if observed is None else raw / step_mean(observed).to(raw)
        return weighed(signal, factor), {"drift_gate/value": rate(scored, raw)}
