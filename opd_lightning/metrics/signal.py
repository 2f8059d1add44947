"""Statistics of the teacher's signal on the student's states in one optimiser step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opd_lightning.metrics.sums import Sums
from opd_lightning.types import RolloutBatch, TokenScores

QUANTILES = (0.01, 0.05, 0.95, 0.99)


class SignalStatistics(Sums):
    """Statistics of the teacher's signal d_t and of both entropies on student states."""

    names = ("tokens", "student_entropy", "known", "teacher_entropy", "entropy_gap",
             "groups", "merged", "grouped", "agree", "disagree")  # fmt: skip
    log_ratios: list[Tensor] | Tensor  # a tensor after ranks are gathered

    def __init__(self) -> None:
        super().__init__()
        self.add_state("log_ratios", [], dist_reduce_fx="cat")

    def update(
        self, batch: RolloutBatch, student: TokenScores, teacher: TokenScores, mask: Tensor
    ) -> None:
        """Add the tokens of `mask [B, R]`, those in the loss of the method."""
        ratio = (teacher.logprobs - student.logprobs.detach())[mask]
        assert isinstance(self.log_ratios, list)
        self.log_ratios.append(ratio)
        # Signs of outcome advantage and d_t; a group of equal rewards counts for neither.
        outcome = (batch.rewards - batch.group_mean)[:, None].expand_as(mask)[mask]
        self._add(
            tokens=len(ratio),
            student_entropy=student.entropy[mask],
            known=~teacher.entropy[mask].isnan(),
            teacher_entropy=teacher.entropy[mask].nan_to_num(0.0),
            entropy_gap=(teacher.entropy - student.entropy).abs()[mask].nan_to_num(0.0),
            groups=0.0 if teacher.ends is None else teacher.ends[mask],
            merged=0.0 if teacher.ends is None else _merged(teacher, teacher.ends)[mask],
            grouped=~outcome.isnan(),
            agree=outcome * ratio > 0,
            disagree=outcome * ratio < 0,
        )

    def compute(self) -> dict[str, Tensor]:
        """Return means over tokens and quantiles of d_t, in nats; empty without tokens."""
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
        # A teacher on a server does not report its entropy.
        if sums["known"] > 0:
            result["entropy/teacher"] = sums["teacher_entropy"] / sums["known"]
            result["entropy/gap"] = sums["entropy_gap"] / sums["known"]
        if sums["groups"] > 0:  # the teacher has another tokenizer
            result["signal/group_length"] = sums["tokens"] / sums["groups"]
            result["signal/merged_groups"] = sums["merged"] / sums["groups"]
        # numpy, because torch.quantile takes at most 2**24 values.
        with np.errstate(invalid="ignore"):  # infinities: the step is skipped and reported
            quantiles = np.quantile(ratio.cpu().numpy(), QUANTILES)
        for q, value in zip(QUANTILES, quantiles, strict=True):
            result[f"signal/log_ratio_q{round(100 * q):02d}"] = torch.tensor(value)
        if sums["grouped"] > 0:
            result["signal/agree_with_reward"] = sums["agree"] / sums["grouped"]
            result["signal/disagree_with_reward"] = sums["disagree"] / sums["grouped"]
        return result


def _merged(teacher: TokenScores, ends: Tensor) -> Tensor:
    """Return the ends of groups with several tokens of the student or of the teacher, `[B, R]`."""
    begins = torch.ones_like(ends)
    begins[:, 1:] = ends[:, :-1]
    several = ~begins
    if teacher.group_tokens is not None:
        several = several | (teacher.group_tokens > 1)
    return ends & several
