"""Gates: rules that use the verifier's reward to keep or drop the teacher's signal."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.losses.advantage import extrapolated
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, is_correct, is_wrong, kept, rate, with_advantage


@dataclass(frozen=True)
class SignGate(Rule):
    """SG-OPD's sign-consistency gate (2606.09304, section 3): the verifier as a trust signal.

        a1 = (R - mean) / std over the prompt's samples      a2 = d_t = log pi_T - log pi_theta
        a1 a2 > 0 (consensus):  A_t = d_t + (scale - 1) (log pi_T - log pi_ref)
        otherwise:              A_t = beta d_t   or as set by `fallback`

    It replaces the incoming advantage. The paper prints a2 with the other sign; its text and
    figures (consensus = the teacher supports a token of a correct rollout) need this one. A group
    of equal rewards has a1 = 0, hence no consensus: plain OPD at beta 1. On a consensus token the
    extrapolated advantage may still oppose d_t, if the reference gives the token a higher
    probability than the teacher; `flip` counts those.

    Rates: consensus, conflict (a1 a2 < 0), flip, degenerate (a1 = 0).

    Args:
        scale: lambda_high, on consensus tokens; the authors' best is 1.8. At 1 the reference is
            not read.
        fallback: "interp": beta d_t (the authors' best); "preserve": d_t; "grpo": a1.
        beta: In [0, 1], of "interp" alone; the authors' best is 1.0. 0 drops tokens without
            consensus.
    """

    scale: float = 1.8
    fallback: Literal["interp", "preserve", "grpo"] = "interp"
    beta: float = 1.0

    needs_groups = True
    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "scale", 0 <= self.scale < float("inf"), "a finite number of 0 or more")
        check(self, "beta", 0 <= self.beta <= 1, "a number in [0, 1]")
        read = self.fallback == "interp" or self.beta == 1
        check(self, "beta", read, f"1, or fallback 'interp': {self.fallback!r} does not read it")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("teacher",) if self.scale == 1 else ("teacher", "reference")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ratio, outcome = scored.log_ratio, scored.outcome_advantage()
        reference = scored.others["reference"].logprobs if self.scale != 1 else None
        trusted = extrapolated(
            scored.teacher.logprobs, scored.student.logprobs, reference, self.scale
        )
        agreement = outcome * ratio
        consensus = agreement > 0
        match self.fallback:
            case "interp":
                other = self.beta * ratio
            case "preserve":
                other = ratio
            case "grpo":
                other = outcome
        return with_advantage(signal, torch.where(consensus, trusted, other)), {
            "sign_gate/consensus": rate(scored, consensus),
            "sign_gate/conflict": rate(scored, agreement < 0),
            "sign_gate/flip": rate(scored, consensus & (trusted * ratio < 0)),
            "sign_gate/degenerate": rate(scored, outcome == 0),
        }


@dataclass(frozen=True)
class CorrectnessGate(Rule):
    """OPDVR's gate (2608.24696): advantages of correct rollouts are >= 0, of wrong ones <= 0.

        A_t <- max(0, A_t) if the rollout is correct,  min(0, A_t) if it is wrong

    For plain d_t the two halves add up to OPD. Unlike `GroupGate` it also trains on groups that
    are all correct or all wrong. A rollout without a score keeps its advantage.

    Rates: zeroed, tokens whose advantage was set to 0.

    Args:
        threshold: Score from which a rollout is correct; ours, the authors' scores are 0 or 1.
    """

    threshold: float = 0.5

    needs_rewards = True
    shapes_advantage = True

    def __post_init__(self) -> None:
        check(self, "threshold", 0 < self.threshold <= 1, "a number in (0, 1]")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        old = signal.advantage
        new = torch.where(is_correct(scored, self.threshold), old.clamp(min=0), old)
        new = torch.where(is_wrong(scored, self.threshold), old.clamp(max=0), new)
        zeroed = signal.mask & (new != old)
        return with_advantage(signal, new), {"correctness_gate/zeroed": rate(scored, zeroed)}


@dataclass(frozen=True)
class GroupGate(Rule):
    """GRPD's gate (2608.24696): keeps advantages with the sign of the outcome advantage.

        A_t <- s max(0, s A_t),   s = sign((R - mean) / std) over the prompt's samples

    Only the sign of the outcome is used. A group of equal rewards gives zero advantages.

    Rates: zeroed, tokens whose advantage was set to 0.
    """

    needs_groups = True
    shapes_advantage = True

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        sign = scored.outcome_advantage().sign()
        new = sign * (sign * signal.advantage).clamp(min=0)
        zeroed = signal.mask & (new != signal.advantage)
        return with_advantage(signal, new), {"group_gate/zeroed": rate(scored, zeroed)}


@dataclass(frozen=True)
class TrajectoryGate(Rule):
    """RG-OPD's gate (2607.04037): keeps whole rollouts on which teacher and verifier agree.

        keep = (A > 0 and L_T > L_S + margin) or (A <= 0 and L_T < L_S - margin)

    A is GRPO's advantage; L_T and L_S are the two models' log-probs of the rollout, summed over
    the selected tokens. Equality drops the rollout, and A = 0 counts as a failure. The
    authors divide by the tokens that are kept.

    Rates: kept.

    Args:
        margin: delta in nats, 0 or more; the authors use 0.
    """

    margin: float = 0.0

    needs = ("teacher",)
    needs_groups = True
    sums_tokens = True

    def __post_init__(self) -> None:
        check(self, "margin", 0 <= self.margin < float("inf"), "a finite number of 0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        won = scored.outcome_advantage() > 0
        # In float64, for a difference of two sums over thousands of tokens.
        ratio = torch.where(signal.mask, scored.log_ratio, 0.0).double()
        gap = ratio.sum(dim=1, keepdim=True)
        keep = (won & (gap > self.margin)) | (~won & (gap < -self.margin))
        return kept(signal, keep), {"trajectory_gate/kept": rate(scored, keep)}


@dataclass(frozen=True)
class OnlyCorrect(Rule):
    """Keeps rollouts by their score: the correct ones, or the wrong ones.

    With `OPD` it distils on what the verifier accepts, with `SFT` and the student's own responses
    it is rejection sampling (RAFT, 2304.06767). A rollout without a score is dropped.

    Rates: kept.

    Args:
        keep: Rollouts to keep.
        threshold: Score from which a rollout is correct.
    """

    keep: Literal["correct", "wrong"] = "correct"
    threshold: float = 0.5

    needs_rewards = True

    def __post_init__(self) -> None:
        check(self, "threshold", 0 < self.threshold <= 1, "a number in (0, 1]")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        chosen = is_correct if self.keep == "correct" else is_wrong
        keep = chosen(scored, self.threshold)
        return kept(signal, keep), {"only_correct/kept": rate(scored, keep)}
