"""Bases of metrics: sums and means that are exact over micro-batches and ranks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.types import RolloutBatch


class Sums(Metric):
    """Named sums since `reset`, kept in one vector so that ranks are summed in one reduction."""

    full_state_update = False
    names: ClassVar[tuple[str, ...]]
    sums: Tensor  # [len(names)] float64

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def _add(self, **values: Tensor | float) -> None:
        """Add the sum of each value; all of `names` are required."""
        added = [torch.as_tensor(values[name], dtype=torch.float64).sum() for name in self.names]
        self.sums += torch.stack([value.to(self.sums.device) for value in added])

    def _totals(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.sums, strict=True))


class NamedMeans(Metric):
    """Means of values whose names become known with the first batch.

    All ranks must add the same names in the same order. Of more than `MAX_NAMES` the first count.
    """

    full_state_update = False
    MAX_NAMES = 300
    sums: Tensor  # [2, MAX_NAMES] float64: sums and counts

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, self.MAX_NAMES, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.names: list[str] = []

    def _count(self, name: str, values: Tensor) -> None:
        """Add values `[N]` to the mean of a name."""
        if name not in self.names:
            if len(self.names) == self.MAX_NAMES:
                return
            self.names.append(name)
        column = self.names.index(name)
        self.sums[0, column] += values.double().sum()
        self.sums[1, column] += len(values)

    def compute(self) -> dict[str, Tensor]:
        means = self.sums[0] / self.sums[1]
        return {name: means[i] for i, name in enumerate(self.names) if self.sums[1, i] > 0}


class Means(NamedMeans):
    """Means of named values over response tokens, such as the rates of rules."""

    def update(self, batch: RolloutBatch, values: dict[str, Tensor]) -> None:
        """Add values `[B, R]` or `[B, 1]`; only response tokens count."""
        mask = batch.response_mask
        for name, value in values.items():
            self._count(name, value.detach().expand_as(mask)[mask])
