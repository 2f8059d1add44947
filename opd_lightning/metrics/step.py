"""Statistics of the responses of one optimiser step, and of the gap of engine and trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.losses.advantage import RESOLUTION
from opd_lightning.metrics.repetition import is_repetitive, repeated_trigrams
from opd_lightning.metrics.sums import NamedMeans, Sums
from opd_lightning.types import RolloutBatch


class ResponseStatistics(Sums):
    """Rewards, lengths and stop reasons of rollouts, separate for demonstrations."""

    names = ("tokens", "rollouts", "length", "truncated", "repetitive", "repeated_trigrams",
             "rewarded", "reward", "unverified", "long_views", "grouped", "degenerate",
             "demonstrations", "demonstrated", "kept", "right")  # fmt: skip

    def update(self, batch: RolloutBatch) -> None:
        own = ~batch.demonstrated
        rewarded = ~batch.rewards.isnan() & own
        written = [r for r in batch.rollouts if not r.author.is_demonstrator()]
        given = [r for r in batch.rollouts if r.author.is_demonstrator()]
        self._add(
            tokens=batch.response_mask,
            rollouts=len(written),
            length=sum(len(r.response_ids) for r in written),
            truncated=batch.truncated & own,
            repetitive=sum(is_repetitive(r.text) for r in written),
            repeated_trigrams=sum(repeated_trigrams(r.response_ids) for r in written),
            rewarded=rewarded,
            reward=batch.rewards[rewarded],
            unverified=sum(r.unverified for r in written),
            long_views=sum(bool(r.long_views) for r in batch.rollouts),
            grouped=~batch.group_std.isnan() & own,
            degenerate=(batch.group_std <= RESOLUTION) & own,
            demonstrations=len(given),
            demonstrated=sum(len(r.response_ids) for r in given),
            kept=sum(not r.dropped for r in given),
            right=batch.rewards[~own].nan_to_num(),
        )

    def compute(self) -> dict[str, Tensor]:
        """Return means over rollouts; of rewards, groups and demonstrations if there are any.

        `response/unverified` and `response/views_too_long` are there only if they are not 0.
        """
        sums = self._totals()
        result = {"response/tokens_per_step": sums["tokens"]}
        if sums["rollouts"] > 0:
            for name in ("length", "truncated", "repetitive", "repeated_trigrams"):
                result[f"response/{name}"] = sums[name] / sums["rollouts"]
        if sums["rewarded"] > 0:
            result["reward"] = sums["reward"] / sums["rewarded"]
        if sums["unverified"] > 0:
            result["response/unverified"] = sums["unverified"] / sums["rollouts"]
        if sums["long_views"] > 0:
            everything = sums["rollouts"] + sums["demonstrations"]
            result["response/views_too_long"] = sums["long_views"] / everything
        if sums["grouped"] > 0:
            result["response/degenerate_groups"] = sums["degenerate"] / sums["grouped"]
        if sums["demonstrations"] > 0:
            result["demonstration/length"] = sums["demonstrated"] / sums["demonstrations"]
            result["demonstration/kept"] = sums["kept"] / sums["demonstrations"]
            result["demonstration/reward"] = sums["right"] / sums["demonstrations"]
        return result


class RewardParts(NamedMeans):
    """Means of the scores that rewards were summed from, over the student's responses."""

    def update(self, batch: RolloutBatch) -> None:
        rollouts = [r for r in batch.rollouts if not r.author.is_demonstrator()]
        for name in batch.rollouts[0].reward_parts:
            scores = torch.tensor([r.reward_parts[name] for r in rollouts], dtype=torch.float64)
            self._count(f"reward/{name}", scores[~scores.isnan()])


class EngineStatistics(Sums):
    """Gap between the engine's and the trainer's log-probs of tokens that the engine sampled."""

    names = ("tokens", "fresh", "gap", "weight", "weight_squared")
    largest: Tensor  # [2] float64: gap and importance weight

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, behaviour: Tensor, student: Tensor, fresh: Tensor) -> None:
        """Add log-probs `[N]` in nats, N possibly 0; weights are `exp(student - behaviour)`.

        The gap covers the tokens sampled from the newest student weights, `fresh [N]` bool.
        """
        ratio = (student - behaviour).double()
        gap, weight = ratio[fresh].abs(), ratio.exp()
        self._add(
            tokens=len(ratio),
            fresh=fresh,
            gap=gap,
            weight=weight,
            weight_squared=weight**2,
        )
        here = torch.stack([torch.cat([x.new_zeros(1), x]).max() for x in (gap, weight)])
        self.largest = torch.maximum(self.largest, here.to(self.largest.device))

    def compute(self) -> dict[str, Tensor]:
        """Return means over tokens and maxima, or nothing without tokens; ESS is a fraction."""
        sums = self._totals()
        if sums["tokens"] == 0:
            return {}
        compared = {
            "engine/logprob_gap_mean": sums["gap"] / sums["fresh"],
            "engine/logprob_gap_max": self.largest[0],
        }
        return (compared if sums["fresh"] > 0 else {}) | {
            "engine/compared": sums["fresh"] / sums["tokens"],
            "engine/importance_mean": sums["weight"] / sums["tokens"],
            "engine/importance_max": self.largest[1],
            "engine/importance_ess": sums["weight"] ** 2
            / (sums["weight_squared"] * sums["tokens"]),
        }
