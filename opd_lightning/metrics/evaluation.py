"""Scores of an evaluation suite, per domain, exact over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.types import Rollout


class SuiteScores(Metric):
    """avg@n: mean score over samples, then over prompts, per domain and over the whole suite.

    Args:
        domains: Every domain of the suite.
    """

    full_state_update = False
    score: Tensor
    rollouts: Tensor
    length: Tensor
    truncated: Tensor

    def __init__(self, domains: Sequence[str]) -> None:
        super().__init__()
        self.domains = sorted(domains)
        for name in ("score", "rollouts", "length", "truncated"):
            zeros = torch.zeros(len(self.domains), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            row = self.domains.index(rollout.prompt.domain)
            self.rollouts[row] += 1
            self.score[row] += rollout.reward
            self.length[row] += len(rollout.response_ids)
            self.truncated[row] += rollout.stop_reason.is_truncated()

    def compute(self) -> dict[str, Tensor]:
        """Mean score, length, truncation of the suite, and "score/<domain>" if it has several.

        Every prompt has the same number of samples, so the mean over rollouts is avg@n.
        """
        total = self.rollouts.sum()
        result = {
            "length": self.length.sum() / total,
            "truncated": self.truncated.sum() / total,
        }
        if self.score.isnan().any():  # no verifier
            return result
        result["score"] = self.score.sum() / total
        if len(self.domains) > 1:
            for row, domain in enumerate(self.domains):
                result[f"score/{domain}"] = self.score[row] / self.rollouts[row]
        return result
