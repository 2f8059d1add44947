"""What one optimiser step looked like, exact over its micro-batches and ranks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.metrics.repetition import is_repetitive
from opd_lightning.types import RolloutBatch, TokenScores

QUANTILES = (0.01, 0.05, 0.95, 0.99)


class _Sums(Metric):
    """Named sums over everything seen since `reset`; one vector, so ranks add up in one go."""

    full_state_update = False
    names: ClassVar[tuple[str, ...]]
    sums: Tensor  # [len(names)] float64

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def _add(self, **values: Tensor | float) -> None:
        """Add the sum of each value; every name must come."""
        added = [torch.as_tensor(values[name], dtype=torch.float64).sum() for name in self.names]
        self.sums += torch.stack([value.to(self.sums.device) for value in added])

    def _totals(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.sums, strict=True))


class ResponseStatistics(_Sums):
    """Rewards, lengths and ends of the step's rollouts, the student's and the others' apart."""

    names = ("tokens", "rollouts", "length", "truncated", "repetitive", "rewarded", "reward",
             "grouped", "degenerate",
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
            rewarded=rewarded,
            reward=batch.rewards[rewarded],
            grouped=~batch.group_std.isnan() & own,
            degenerate=(batch.group_std == 0) & own,
            demonstrations=len(given),
            demonstrated=sum(len(r.response_ids) for r in given),
            kept=sum(not r.dropped for r in given),
            right=batch.rewards[~own].nan_to_num(),
        )

    def compute(self) -> dict[str, Tensor]:
        """Means over rollouts; about rewards, groups and authors only where there are any."""
        sums = self._totals()
        result = {"response/tokens_per_step": sums["tokens"]}
        if sums["rollouts"] > 0:
            for name in ("length", "truncated", "repetitive"):
                result[f"response/{name}"] = sums[name] / sums["rollouts"]
        if sums["rewarded"] > 0:
            result["reward"] = sums["reward"] / sums["rewarded"]
        if sums["grouped"] > 0:
            result["response/degenerate_groups"] = sums["degenerate"] / sums["grouped"]
        if sums["demonstrations"] > 0:
            result["demonstration/length"] = sums["demonstrated"] / sums["demonstrations"]
            result["demonstration/kept"] = sums["kept"] / sums["demonstrations"]
            result["demonstration/reward"] = sums["right"] / sums["demonstrations"]
        return result


class EngineStatistics(_Sums):
    """How far the engine's log-probs of its own samples are from the trainer's."""

    names = ("tokens", "fresh", "gap", "weight", "weight_squared")
    largest: Tensor  # [2] float64: gap and importance weight

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, behaviour: Tensor, student: Tensor, fresh: Tensor) -> None:
        """Both `[N]` nats, N possibly 0; importance weights are `exp(student - behaviour)`.

        The gap is of the tokens that the student's newest weights sampled, `fresh [N]` bool.
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
        """Means over tokens, and maxima; empty without tokens. ESS is a fraction of the tokens."""
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


class SignalStatistics(_Sums):
    """The teacher's signal d_t on student states, and how alike the two models are there."""

    names = ("tokens", "student_entropy", "known", "teacher_entropy", "entropy_gap", "ranked",
             "overlap", "groups", "grouped", "agree", "disagree")  # fmt: skip
    log_ratios: list[Tensor] | Tensor  # a tensor once ranks are gathered

    def __init__(self) -> None:
        super().__init__()
        self.add_state("log_ratios", [], dist_reduce_fx="cat")

    def update(
        self, batch: RolloutBatch, student: TokenScores, teacher: TokenScores, mask: Tensor
    ) -> None:
        """`mask [B, R]`: the tokens that the method's own loss is on."""
        ratio = (teacher.logprobs - student.logprobs.detach())[mask]
        assert isinstance(self.log_ratios, list)
        self.log_ratios.append(ratio)
        ours, theirs = student.top_ids[mask], teacher.top_ids[mask]
        # Sign of the outcome advantage against that of d_t; a group of equals agrees with nobody.
        outcome = (batch.rewards - batch.group_mean)[:, None].expand_as(mask)[mask]
        self._add(
            tokens=len(ratio),
            student_entropy=student.entropy[mask],
            known=~teacher.entropy[mask].isnan(),
            teacher_entropy=teacher.entropy[mask].nan_to_num(0.0),
            entropy_gap=(teacher.entropy - student.entropy).abs()[mask].nan_to_num(0.0),
            ranked=len(ratio) if theirs.shape[1] else 0,
            overlap=(ours[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean(dim=1),
            groups=0.0 if teacher.ends is None else teacher.ends[mask],
            grouped=~outcome.isnan(),
            agree=outcome * ratio > 0,
            disagree=outcome * ratio < 0,
        )

    def compute(self) -> dict[str, Tensor]:
        """Means over tokens and quantiles of d_t in nats; empty without tokens."""
        sums = self._totals()
        if sums["tokens"] == 0:
            return {}
        ratios = self.log_ratios
        ratio = (torch.cat(ratios) if isinstance(ratios, list) else ratios).double()
        result = {
            "signal/log_ratio_mean": ratio.mean(),
            "signal/log_ratio_abs_mean": ratio.abs().mean(),
            "signal/positive": (ratio > 0).double().mean(),
            "entropy/student": sums["student_entropy"] / sums["tokens"],
        }
        # A teacher elsewhere tells neither its entropy nor, perhaps, its ranking.
        if sums["known"] > 0:
            result["entropy/teacher"] = sums["teacher_entropy"] / sums["known"]
            result["entropy/gap"] = sums["entropy_gap"] / sums["known"]
        if sums["ranked"] > 0:
            result["signal/overlap"] = sums["overlap"] / sums["ranked"]
        if sums["groups"] > 0:  # the teacher has other tokens
            result["signal/group_length"] = sums["tokens"] / sums["groups"]
        # numpy, because torch.quantile takes at most 2**24 values.
        for q, value in zip(QUANTILES, np.quantile(ratio.cpu().numpy(), QUANTILES), strict=True):
            result[f"signal/log_ratio_q{round(100 * q):02d}"] = torch.tensor(value)
        if sums["grouped"] > 0:
            result["signal/agree_with_reward"] = sums["agree"] / sums["grouped"]
            result["signal/disagree_with_reward"] = sums["disagree"] / sums["grouped"]
        return result


class Means(Metric):
    """Means over response tokens of whatever is named, such as the rates of rules.

    All ranks must name the same things in the same order, which a run's rules do.
    """

    full_state_update = False
    MOST = 64  # names
    sums: Tensor  # [2, MOST] float64: sums and counts

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, self.MOST, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.names: list[str] = []

    def update(self, batch: RolloutBatch, values: dict[str, Tensor]) -> None:
        """Add values `[B, R]` or `[B, 1]`; only response tokens count."""
        mask = batch.response_mask
        for name, value in values.items():
            if name not in self.names:
                self.names.append(name)
            kept = value.detach().expand_as(mask)[mask].double()
            column = self.names.index(name)
            self.sums[0, column] += kept.sum()
            self.sums[1, column] += len(kept)

    def compute(self) -> dict[str, Tensor]:
        means = self.sums[0] / self.sums[1]
        return {name: means[i] for i, name in enumerate(self.names) if self.sums[1, i] > 0}
