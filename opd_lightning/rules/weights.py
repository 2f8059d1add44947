"""Weights by log-ratio, by position, and by likelihood within a prompt's samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import (
    check,
    is_correct,
    rate,
    step_mean,
    weighed,
    with_advantage,
)
from opd_lightning.rules.masks import positions


@dataclass(frozen=True)
class StabilityWeight(Rule):
    """SG-OPD's weight (2606.09304, section 3): smaller for tokens with large |d_t|.

        phi_t = min(1, tau / |d_t|), divided by its mean over the step's selected tokens

    It does not change the advantage, hence not the decisions of a gate.

    Rates: softened, tokens with |d| > tau.

    Args:
        tau: In nats, above 0. Not published; 5 is ours. Infinity gives every token weight 1.
    """

    tau: float = 5.0

    needs = ("teacher",)
    step_wide = True
    divides = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "tau", self.tau > 0, "more than 0")

    def _raw(self, scored: Scored) -> Tensor:
        size = scored.log_ratio.abs()
        return torch.where(size <= self.tau, 1.0, self.tau / size)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[1, 2]`: the sum of the raw weights and the number of tokens."""
        raw = self._raw(scored)[signal.mask].double()
        return torch.stack([raw.sum(), signal.mask.sum().double()])[None]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        raw = self._raw(scored)
        if observed is not None:
            raw = raw / step_mean(observed).to(raw)
        return weighed(signal, raw), {
            "stability_weight/softened": rate(scored, scored.log_ratio.abs() > self.tau)
        }


@dataclass(frozen=True)
class PositionWeight(Rule):
    """IW-OPD (2606.22600): weight that falls with the models' accumulated difference so far.

        w_t = 1 + gamma (1 - sum_{s < t} |a_s| / sum_s |a_s|)

    Falls from 1 + gamma towards 1 over the selected tokens. The authors compute a from the
    sampler's log-probs; ours is d_t, from the trainer's, like every log-ratio here.

    Rates: value, the mean weight.

    Args:
        gamma: 0 or more; the authors use 0.5. 0 is plain OPD.
    """

    gamma: float = 0.5

    needs = ("teacher",)
    sums_tokens = True
    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "gamma", 0 <= self.gamma < float("inf"), "a finite number of 0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        size = torch.where(signal.mask, scored.log_ratio.abs(), 0.0)
        before = size.cumsum(dim=1) - size
        total = size.sum(dim=1, keepdim=True)
        share = torch.where(total > 0, before / total, 0.0)  # the total of identical models is 0
        factor = 1 + self.gamma * (1 - share)
        return weighed(signal, factor), {"position_weight/value": rate(scored, factor)}


@dataclass(frozen=True)
class LateWeight(Rule):
    """PW-OPSD (2605.21606; from secondary sources): weight that rises along a response.

        w_t = least + (1 - least) sigmoid((t / T - centre) / width),   t from 0, T tokens

    Rates: value, the mean weight.

    Args:
        least: Weight that the first tokens approach, in [0, 1].
        centre: Relative position of the middle of the rise.
        width: Relative width of the rise, above 0.
    """

    least: float = 0.25
    centre: float = 0.3
    width: float = 0.1

    ignores_weights = True

    def __post_init__(self) -> None:
        check(self, "least", 0 <= self.least <= 1, "a number in [0, 1]")
        check(self, "width", self.width > 0, "more than 0")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        length = scored.batch.response_mask.sum(dim=1, keepdim=True).clamp(min=1)
        rise = torch.sigmoid((positions(scored) / length - self.centre) / self.width)
        factor = (self.least + (1 - self.least) * rise).to(signal.weight)
        return weighed(signal, factor), {"late_weight/value": rate(scored, factor)}


@dataclass(frozen=True)
class ScopeWeight(Rule):
    """SCOPE (2604.10688): correct rollouts are imitated, wrong ones corrected by the teacher.

        correct: A_t = 1, maximum likelihood; w in proportion to PPL_S(y)^(1/temperature)
        wrong:   A_t as it was (d_t);         w in proportion to PPL_T(y)^(-1/temperature)

    among the correct, or the wrong, samples of one prompt. Thus the largest weights go to correct
    samples that the student finds improbable and wrong ones that the teacher finds probable. This
    is the paper's direction; the flags of the published script invert the first one. Weights have
    mean 1 over such a set, as in the authors' code (their paper: sum 1), so a single sample has 1.
    Perplexities are over the selected tokens. A rollout without a score is not changed.

    Rates: correct; weight, its mean.

    Args:
        temperature: tau, above 0; the authors use 1. Infinity gives every rollout weight 1.
        threshold: Score from which a rollout is correct; ours, the authors' scores are 0 or 1.
    """

    temperature: float = 1.0
    threshold: float = 0.5

    needs = ("teacher",)
    sums_tokens = True
    needs_rewards = True
    shapes_advantage = True
    step_wide = True  # a prompt's samples may be in several micro-batches

    def __post_init__(self) -> None:
        check(self, "temperature", self.temperature > 0, "more than 0")
        check(self, "threshold", 0 < self.threshold <= 1, "a number in (0, 1]")

    def _rows(self, signal: Signal, scored: Scored) -> tuple[Tensor, Tensor]:
        """Return (`[B, 3]` of group, correctness and logit; `[B]` bool, selected rows)."""
        correct = is_correct(scored, self.threshold)
        tokens = signal.mask.sum(dim=1)
        # log PPL is minus the mean log-prob: up with the student's, down with the teacher's.
        logprobs = torch.where(correct, -scored.student.logprobs, scored.teacher.logprobs)
        logprobs = torch.where(signal.mask, logprobs, 0.0).double()
        logit = logprobs.sum(dim=1) / tokens.clamp(min=1) / self.temperature
        # float64 holds group numbers exactly up to 2**53.
        columns = [scored.batch.groups.double(), correct[:, 0].double(), logit]
        return torch.stack(columns, dim=1), ~scored.batch.rewards.isnan() & (tokens > 0)

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[M, 3]` float64: group, 1 if correct, logit, of selected rollouts."""
        rows, present = self._rows(signal, scored)
        return rows[present]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        assert observed is not None, "step-wide"
        rows, present = self._rows(signal, scored)
        peers = (rows[:, None, :2] == observed[None, :, :2]).all(dim=2)  # [B, M]
        logits = torch.where(peers, observed[None, :, 2], -torch.inf)
        share = (rows[:, 2] - logits.logsumexp(dim=1)).exp()  # softmax over the peers
        factor = torch.where(present, share * peers.sum(dim=1), 1.0)[:, None]
        correct = is_correct(scored, self.threshold)
        routed = with_advantage(signal, torch.where(correct, 1.0, signal.advantage))
        return weighed(routed, factor.to(signal.weight)), {
            "scope/correct": rate(scored, correct),
            "scope/weight": rate(scored, factor),
        }
