"""Rules on evidence: the change of the teacher's log-prob of a token by the privileged text.

    e_t = log pi_T(y_t | with the text) - log pi_T(y_t | without it)

One teacher scores the same tokens twice, as "teacher" and as "plain".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, kept, rate, weighed, with_advantage

LEVERAGE = 0.05  # |exp(e) - 1| from which a token counts as moved (EDGE-OPD's diagnostics)


def evidence_of(scored: Scored) -> Tensor:
    """Return e_t, `[B, R]` nats: positive if the privileged text makes the token more probable."""
    return scored.teacher.logprobs - scored.others["plain"].logprobs


def diagnostics(scored: Scored, active: Tensor) -> Rates:
    """Return EDGE-OPD's metrics: mean e and |e|, leverage of active tokens, agreement with d."""
    evidence = evidence_of(scored)
    moved = active & (torch.expm1(evidence).abs() > LEVERAGE)
    return {
        "evidence/mean": rate(scored, evidence),
        "evidence/abs_mean": rate(scored, evidence.abs()),
        "evidence/leverage": rate(scored, moved),
        "evidence/agreement": rate(scored, evidence.sign() == scored.log_ratio.sign()),
    }


@dataclass(frozen=True)
class EvidenceMask(Rule):
    """EDGE-OPD's mask (2605.23493): keeps tokens that the privileged text makes more probable.

    The others get no loss, which differs from a loss that lowers their probability. Without
    privileged text e is 0 everywhere and, both inequalities being strict, no token is kept. The
    authors' sum is per sequence and its normaliser is not stated.

    Rates: kept, mean, abs_mean, leverage (|exp(e) - 1| > 0.05 among kept tokens), agreement
    (sign e = sign d).

    Args:
        region: "positive": e > threshold, the method; "negative": e < threshold and "near-zero":
            |e| <= width, the authors' controls.
        threshold: In nats, of "positive" and "negative" alone; the authors use 0.
        width: In nats, of "near-zero" alone; the authors use 0.1. It overlaps the other two
            regions.
    """

    region: Literal["positive", "negative", "near-zero"] = "positive"
    threshold: float = 0.0
    width: float = 0.1

    needs = ("teacher", "plain")

    def __post_init__(self) -> None:
        check(self, "threshold", self.threshold == self.threshold, "a number")
        check(self, "width", self.width >= 0, "0 or more")
        by_width = self.region == "near-zero"
        unread = f"its default: region {self.region!r} does not read it"
        check(self, "threshold", not by_width or self.threshold == EvidenceMask.threshold, unread)
        check(self, "width", by_width or self.width == EvidenceMask.width, unread)

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        evidence = evidence_of(scored)
        match self.region:
            case "positive":
                keep = evidence > self.threshold
            case "negative":
                keep = evidence < self.threshold
            case "near-zero":
                keep = evidence.abs() <= self.width
        return kept(signal, keep), {
            "evidence/kept": rate(scored, keep),
            **diagnostics(scored, active=keep),
        }


@dataclass(frozen=True)
class EvidenceWeight(Rule):
    """RLSD without a verifier (2605.23493, its soft baseline): every token, weighted by evidence.

        weight_t <- weight_t clip(exp(e_t), 1 - epsilon, 1 + epsilon)

    Rates: mean, abs_mean, leverage, agreement as in `EvidenceMask`, all tokens being active;
    shift, the mean |clip(exp(e)) - 1|.

    Args:
        epsilon: In [0, 1]. Not published for this method; 0.2 is RLSD's.
    """

    epsilon: float = 0.2

    needs = ("teacher", "plain")

    def __post_init__(self) -> None:
        check(self, "epsilon", 0 <= self.epsilon <= 1, "a number in [0, 1]")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        factor = evidence_of(scored).exp().clamp(1 - self.epsilon, 1 + self.epsilon)
        return weighed(signal, factor), {
            "evidence/shift": rate(scored, (factor - 1).abs()),
            **diagnostics(scored, active=scored.batch.response_mask),
        }


@dataclass(frozen=True)
class EvidenceMultiplier(Rule):
    """RLSD (2604.03128): the verifier determines the advantage's sign, evidence its size.

        A_t <- A_t [(1 - mix) + mix clip(exp(sign(A_t) e_t), 1 - epsilon, 1 + epsilon)]

    for an advantage computed from rewards, such as GRPO's. No sign ever changes.

    Rates: shift, the mean |factor - 1|.

    Args:
        epsilon: In [0, 1]; the authors use 0.2. 0 does not change the advantage.
        mix: In [0, 1], or a schedule of it; the authors use 1, which some of their runs decay.
        evidence: Baseline of e. "teacher": the teacher without the text, as EDGE-OPD (2605.23493)
            reads the method, for comparable runs; "student": the student without it, the original.
            Both are equal while the student has the weights of the teacher.
    """

    epsilon: float = 0.2
    mix: float | Schedule = 1.0
    evidence: Literal["teacher", "student"] = "teacher"

    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "epsilon", 0 <= self.epsilon <= 1, "a number in [0, 1]")
        ok = isinstance(self.mix, Schedule) or 0 <= self.mix <= 1
        check(self, "mix", ok, "a number in [0, 1] or a schedule")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("teacher", "plain") if self.evidence == "teacher" else ("teacher",)

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        evidence = evidence_of(scored) if self.evidence == "teacher" else scored.log_ratio
        mix = value_at(self.mix, scored.batch.totals.step)
        power = (signal.advantage.sign() * evidence).exp()
        factor = (1 - mix) + mix * power.clamp(1 - self.epsilon, 1 + self.epsilon)
        return with_advantage(signal, signal.advantage * factor), {
            "evidence/shift": rate(scored, (factor - 1).abs())
        }
