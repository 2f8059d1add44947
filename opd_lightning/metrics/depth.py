"""The teacher's signal by position in the response."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.types import TokenScores

DECILES = 10


class DepthStatistics(Metric):
    """Statistics of d_t by depth, in tenths of the maximum response length.

    `limit` is that length in tokens.
    """

    full_state_update = False
    sums: Tensor  # [3, 10] float64: tokens, d_t, |d_t|

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1
        zeros = torch.zeros(3, DECILES, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, student: TokenScores, teacher: TokenScores, mask: Tensor) -> None:
        """Add the tokens of `mask [B, R]`; column = position in the response."""
        ratio = (teacher.logprobs - student.logprobs.detach())[mask].double()
        position = mask.nonzero()[:, 1]
        decile = (position * DECILES // self.limit).clamp_max(DECILES - 1)
        rows = torch.stack([torch.ones_like(ratio), ratio, ratio.abs()])
        self.sums.index_add_(1, decile.to(self.sums.device), rows.to(self.sums.device))

    def compute(self) -> dict[str, Tensor]:
        """Return means in nats over the tokens of each tenth that has any."""
        tokens, ratio, size = self.sums
        return {
            f"depth_{name}/{decile}": values[decile] / tokens[decile]
            for name, values in (("log_ratio", ratio), ("log_ratio_abs", size))
            for decile in range(DECILES)
            if tokens[decile] > 0
        }
