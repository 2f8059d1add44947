"""Weights of imitated tokens by the student's own distribution, for `SFT`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, rate, weighed
from opd_lightning.rules.masks import relative_entropy


@dataclass(frozen=True)
class LikelihoodWeight(Rule):
    """Weighs a token by its probability p under the student, detached.

        "p":      p^power. At 1 DFT (2508.05629), which takes the inverse probability out of the
                  gradient of SFT; in general the loss (1 - p^power) / power (2510.00526)
        "p(1-p)": CHORD's phi (2508.11408), largest where the student is undecided

    Both lower the weight of tokens that the student finds improbable. Official code of the first;
    the second is known from secondary sources.

    Rates: value, the mean weight.

    Args:
        form: Function of p.
        power: Of "p", above 0.
    """

    form: Literal["p", "p(1-p)"] = "p"
    power: float = 1.0

    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "power", 0 < self.power < float("inf"), "a finite number above 0")
        check(self, "power", self.form == "p" or self.power == 1, "1 for any form but 'p'")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        p = scored.student.logprobs.exp()
        factor = p**self.power if self.form == "p" else p * (1 - p)
        return weighed(signal, factor), {"likelihood_weight/value": rate(scored, factor)}


@dataclass(frozen=True)
class InDistributionWeight(Rule):
    """IDFT (2602.12222; official code): weighs less what is out of the student's distribution.

        w_t = p^gamma,   gamma = clip(exp(-CLL / temperature), low, high),   CLL = log p + H

    p is the student's probability of the token, H the entropy of its distribution, so that the
    centred log-likelihood CLL has mean 0 under the student. At gamma 1 it is DFT. Detached.

    Rates: value, the mean weight; centred, the mean CLL.

    Args:
        temperature: beta of the code, above 0.
        low: Smallest gamma, 0 or more.
        high: Largest gamma.
    """

    temperature: float = 1.0
    low: float = 0.1
    high: float = 2.0

    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "temperature", self.temperature > 0, "more than 0")
        check(self, "low", 0 <= self.low <= self.high, f"from 0 to high ({self.high})")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        logprob = scored.student.logprobs
        centred = logprob + scored.student.entropy
        gamma = (-centred / self.temperature).exp().clamp(self.low, self.high)
        factor = (gamma * logprob).exp()
        return weighed(signal, factor), {
            "in_distribution_weight/value": rate(scored, factor),
            "in_distribution_weight/centred": rate(scored, centred),
        }


@dataclass(frozen=True)
class EntropyWeight(Rule):
    """EAFT (2601.02151): weighs a token by the student's relative entropy, `H / log V`, detached.

    A token on which the student is sure of another one is imitated least. The formula is that of
    the code of IDFT's authors, who compare with it.

    Rates: value, the mean weight.
    """

    comparison: ClassVar[str] = "relative_entropy"  # key in `Scored.values`: in [0, 1]
    ignores_weights = True

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.comparison: Compare(None, relative_entropy)}

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        factor = scored.values[self.comparison]
        return weighed(signal, factor), {"entropy_weight/value": rate(scored, factor)}
