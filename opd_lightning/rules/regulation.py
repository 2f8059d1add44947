"""Rules on the advantage's size: clips, floors, a baseline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lightning.losses.divergence import ReverseKL
from opd_lightning.losses.estimators import k3
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, kept, quantile, rate, with_advantage


@dataclass(frozen=True)
class HardClip(Rule):
    """`A_t <- clip(A_t, low, high)` (MOPD, 2606.30406; Demystifying OPD, 2607.13399).

    Rates: clipped.

    Args:
        low: In nats; MOPD's -5.
        high: In nats; MOPD's 5. The other paper does not publish its bounds.
    """

    low: float = -5.0
    high: float = 5.0

    shapes_advantage = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "low", self.low <= self.high, f"at most high ({self.high})")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        new = signal.advantage.clamp(self.low, self.high)
        clipped = signal.mask & (new != signal.advantage)
        return with_advantage(signal, new), {"hard_clip/clipped": rate(scored, clipped)}


@dataclass(frozen=True)
class SoftLog(Rule):
    """`A_t <- sign(A_t) log(1 + |A_t|)` (Demystifying OPD, 2607.13399): odd, slope 1 at 0."""

    shapes_advantage = True

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        old = signal.advantage
        return with_advantage(signal, old.sign() * old.abs().log1p()), {}


@dataclass(frozen=True)
class PowerReward(Rule):
    """PowerOPD (2606.17199; official code): `A_t <- pi_T(y_t)^alpha - pi_theta(y_t)^alpha`.

    It has the sign of d_t and is bounded by 1. It replaces the advantage, so list it first.

    Args:
        alpha: Above 0; 5 in the authors' script. `A_t / alpha` tends to d_t as alpha falls to 0.
    """

    alpha: float = 5.0

    needs = ("teacher",)
    reads_probabilities = True
    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "alpha", 0 < self.alpha < math.inf, "a finite number above 0")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ours, theirs = ((self.alpha * x.logprobs).exp() for x in (scored.student, scored.teacher))
        return with_advantage(signal, theirs - ours), {}


@dataclass(frozen=True)
class ReliableExtrapolation(Rule):
    """REOPD's adaptive scale of G-OPD, without its budget (its arXiv number is not known here).

        A_t <- A_t + gamma q_t (log pi_T(y_t) - log pi_ref(y_t)),   q_t = exp(-k3(d_t) / tau)
        k3(d) = exp(d) - 1 - d

    So the scale of a token is 1 + gamma q_t: above 1 only where both models agree on it. The
    authors set gamma by a budget that is calibrated and smoothed during the run, at most 1.

    Rates: reliability, the mean of q.

    Args:
        gamma: Largest addition to the scale, 0 or more, or a schedule.
        tau: Above 0; the authors use 0.007.
    """

    gamma: float | Schedule
    tau: float = 0.007

    needs = ("teacher", "reference")
    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "tau", self.tau > 0, "more than 0")
        check(self, "gamma", value_at(self.gamma, 0) >= 0, "0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        distance = k3(scored.student.logprobs, scored.teacher.logprobs)
        reliability = (-distance / self.tau).exp()
        gain = scored.teacher.logprobs - scored.others["reference"].logprobs
        gamma = value_at(self.gamma, scored.batch.totals.step)
        return with_advantage(signal, signal.advantage + gamma * reliability * gain), {
            "extrapolation/reliability": rate(scored, reliability)
        }


@dataclass(frozen=True)
class VocabularyBaseline(Rule):
    """vOPD (2605.07865): `A_t <- A_t + KL(pi_theta || pi_T)` of the token's prefix.

    The baseline `E[d] = -KL` depends on the prefix only, so it changes the variance of the gradient
    of d_t but not its expectation. It reads full distributions: needs a teacher in this process.

    Rates: value, the baseline's mean.
    """

    comparison: ClassVar[str] = "baseline"  # key in `Scored.values`: reverse KL in nats
    shapes_advantage = True

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.comparison: Compare("teacher", ReverseKL())}

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        divergence = scored.values[self.comparison]
        return with_advantage(signal, signal.advantage + divergence), {
            "baseline/value": rate(scored, -divergence)
        }


@dataclass(frozen=True)
class Floor(Rule):
    """REOPOLD's relaxed reward (2603.11137): `A_t <- max(A_t, log(mixing) / (1 - mixing))`.

    The floor bounds the reward towards a target that mixes the student into the teacher,
    `log((1 - mixing) e^d + mixing) / (1 - mixing) >= max(d, floor)`: -2.56 nats at 0.1, -1.72 at
    0.3. There is no ceiling.

    Rates: clipped.

    Args:
        mixing: lambda in [0, 1); 0 is no floor. Reports of the authors' value disagree between
            0.1 and 0.3.
    """

    mixing: float = 0.3

    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "mixing", 0 <= self.mixing < 1, "a number in [0, 1)")

    @property
    def value(self) -> float:
        """The floor in nats."""
        return math.log(self.mixing) / (1 - self.mixing) if self.mixing else -math.inf

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        clipped = signal.mask & (signal.advantage < self.value)
        raised = with_advantage(signal, signal.advantage.clamp(min=self.value))
        return raised, {"floor/clipped": rate(scored, clipped)}


@dataclass(frozen=True, kw_only=True)
class PhasedFloor(Floor):
    """REOPOLD (2603.11137): the floor, and a mask by phase of the run.

        before switch_step (exploration):  tokens whose advantage is at or above the floor
        from switch_step (refinement):     tokens whose student entropy is among the step's highest

    The refinement threshold is the (1 - top) quantile of the student's entropy over all selected
    tokens of the step. The authors divide by the number of kept tokens.

    Rates: clipped as in `Floor`; kept.

    Args:
        switch_step: First optimiser step of the refinement; the authors use half of the run.
        top: beta in (0, 1], the share of tokens that refinement keeps; the authors use 0.2.
    """

    switch_step: int
    top: float = 0.2

    step_wide = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "top", 0 < self.top <= 1, "a number in (0, 1]")
        check(self, "switch_step", self.switch_step >= 0, "0 or more")

    def observes(self, step: int) -> bool:
        return step >= self.switch_step

    def _refines(self, scored: Scored) -> bool:
        return self.observes(scored.batch.totals.step)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return student entropies in nats, `[N, 1]`."""
        return scored.student.entropy[signal.mask][:, None].double()

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        raised, rates = super().apply(signal, scored)
        if self._refines(scored):
            assert observed is not None, "step-wide"
            keep = scored.student.entropy >= quantile(observed[:, 0], 1 - self.top)
        else:
            keep = signal.advantage >= self.value
        return kept(raised, keep), {**rates, "floor/kept": rate(scored, keep)}


@dataclass(frozen=True)
class AddOutcome(Rule):
    """Adds GRPO's advantage of the rollout: reward and teacher in one sum.

        A_t <- A_t + coefficient (R - mean) / std   over the prompt's samples

    Rates: size, the mean absolute value of what is added.

    Args:
        coefficient: Weight in nats, or a schedule of it.
        normalise_std: Divide by the group's standard deviation.
    """

    coefficient: float | Schedule = 1.0
    normalise_std: bool = True

    needs_groups = True
    shapes_advantage = True

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        coefficient = value_at(self.coefficient, scored.batch.totals.step)
        added = coefficient * scored.outcome_advantage(normalise=self.normalise_std)
        rates = {"add_outcome/size": rate(scored, added.abs())}
        return with_advantage(signal, signal.advantage + added), rates
