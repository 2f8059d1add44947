"""Advantages that are made to agree with the outcome, within a response or between responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, is_correct, is_wrong, rate, with_advantage

SMALLEST = 1e-8  # lower bound of the median that divides advantages


@dataclass(frozen=True)
class AlignedReweighting(Rule):
    """R2-OPD (2609.35517): advantages reweighted by agreement with the outcome.

        z = 2 R - 1,   nu = median |A_j| of the response
        g_t = sigmoid(sharpness z A_t / nu)
        A_t <- A_t g_t sum_j |A_j| / sum_j g_j |A_j|

    Preserves signs and the sum of |A| over the selected tokens of a response. Responses without a
    score, and truncated ones (as by the authors), are not changed. From secondary sources.

    Rates: agreeing, tokens with z A_t > 0; size, the mean of |A_t| after reweighting.

    Args:
        sharpness: beta, 0 or more; 0 changes nothing. The authors use 1e-3 throughout.
    """

    sharpness: float = 1e-3

    needs_rewards = True
    sums_tokens = True
    shapes_advantage = True

    def __post_init__(self) -> None:
        ok = 0 <= self.sharpness < float("inf")
        check(self, "sharpness", ok, "a finite number of 0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        old = torch.where(signal.mask, signal.advantage, 0.0)
        size = old.abs()
        outcome = (2 * scored.batch.rewards - 1)[:, None].to(old.dtype)
        median = torch.where(signal.mask, size, torch.nan).nanquantile(0.5, dim=1, keepdim=True)
        gate = torch.sigmoid(self.sharpness * outcome * old / median.clamp(min=SMALLEST))
        total = (gate * size).sum(dim=1, keepdim=True)
        scale = size.sum(dim=1, keepdim=True) / total
        applies = ~scored.batch.truncated[:, None] & (total > 0)  # False without a score
        new = torch.where(applies, old * gate * scale, old)
        agreeing = signal.mask & (outcome * old > 0)
        return with_advantage(signal, new), {
            "aligned_reweighting/agreeing": rate(scored, agreeing),
            "aligned_reweighting/size": rate(scored, torch.where(signal.mask, new.abs(), 0.0)),
        }


@dataclass(frozen=True)
class MarginShift(Rule):
    """Uni-OPD's margin calibration (2605.03677; official code): correct above wrong rollouts.

        m_i = mean A_t of rollout i;  C, W: correct and wrong rollouts of its prompt
        shift = max(0, margin - (mean_C m - mean_W m))      "mean";  min_C m - max_W m: "extreme"
        A_t <- A_t + shift / 2 if correct,  A_t - shift / 2 if wrong      "both"

    A prompt whose rollouts are all correct or all wrong is not changed, nor is a rollout without a
    score. Means are over the selected tokens. Not implemented: the authors' mask, which drops
    rollouts instead, and their balancing of prompts.

    Rates: shifted, tokens of prompts with a shift; shift, its mean in nats.

    Args:
        margin: delta in nats, 0 or more; 0.4 in the authors' scripts.
        statistic: What is compared.
        moves: Whose advantages move, by the whole shift if only one kind does.
        threshold: Score from which a rollout is correct; ours, the authors' scores are 0 or 1.
    """

    margin: float = 0.4
    statistic: Literal["mean", "extreme"] = "mean"
    moves: Literal["both", "correct", "wrong"] = "both"
    threshold: float = 0.5

    needs_groups = True
    sums_tokens = True
    shapes_advantage = True
    step_wide = True  # a prompt's samples may be in several micro-batches

    def __post_init__(self) -> None:
        check(self, "margin", 0 <= self.margin < float("inf"), "a finite number of 0 or more")
        check(self, "threshold", 0 < self.threshold <= 1, "a number in (0, 1]")

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return `[M, 3]` float64: group, 1 if correct, mean advantage, of scored rollouts."""
        correct = is_correct(scored, self.threshold)
        tokens = signal.mask.sum(dim=1)
        present = ~scored.batch.rewards.isnan() & (tokens > 0)
        total = torch.where(signal.mask, signal.advantage, 0.0).double().sum(dim=1)
        mean = total / tokens.clamp(min=1)
        # float64 holds group numbers exactly up to 2**53.
        columns = [scored.batch.groups.double(), correct[:, 0].double(), mean]
        return torch.stack(columns, dim=1)[present]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        assert observed is not None, "step-wide"
        shift = self._shift(scored.batch.groups, observed)[:, None]
        part = 0.5 if self.moves == "both" else 1.0
        up = part * is_correct(scored, self.threshold) * (self.moves != "wrong")
        down = part * is_wrong(scored, self.threshold) * (self.moves != "correct")
        moved = signal.advantage + (shift * (up - down)).to(signal.advantage.dtype)
        return with_advantage(signal, moved), {
            "margin_shift/shifted": rate(scored, shift > 0),
            "margin_shift/shift": rate(scored, shift),
        }

    def _shift(self, groups: Tensor, observed: Tensor) -> Tensor:
        """Return the shift of each row's group, `[B]` float64; 0 where it cannot be known."""
        group, correct, mean = observed.unbind(dim=1)
        mine = groups[:, None].double() == group  # [B, M]
        right, wrong = mine & (correct > 0), mine & (correct == 0)
        if self.statistic == "mean":
            low = (right * mean).sum(dim=1) / right.sum(dim=1)
            high = (wrong * mean).sum(dim=1) / wrong.sum(dim=1)
        else:
            edge = mean.new_full((len(groups), 1), torch.inf)  # if the step has no rollouts
            low = torch.cat([torch.where(right, mean, torch.inf), edge], dim=1).amin(dim=1)
            high = torch.cat([torch.where(wrong, mean, -torch.inf), -edge], dim=1).amax(dim=1)
        known = right.any(dim=1) & wrong.any(dim=1)
        return torch.where(known, (self.margin - (low - high)).clamp(min=0), 0.0)
