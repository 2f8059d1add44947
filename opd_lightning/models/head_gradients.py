"""Gradients of a linear head, summed over chunks of tokens.

Axes: N response tokens of a micro-batch, n of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Gradients:
    """Gradients of hidden states `[N, H]` and weight `[V, H]`, from those of logits in chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, of_weight: bool) -> None:
        self.to_hidden = torch.empty_like(hidden)
        self.to_weight = torch.zeros_like(weight) if of_weight else None
        # Rounding error of the 16-bit sum. Sum and error together have float32 accuracy and need
        # half of the extra memory of a float32 sum.
        is_half = of_weight and weight.dtype.itemsize < torch.float32.itemsize
        self.lost = torch.zeros_like(weight) if is_half else None

    def add(self, rows: slice, raw: Tensor, states: Tensor, matrix: Tensor) -> None:
        """Add a chunk: gradient of its logits `[n, V]`, its hidden states and the vocabulary's."""
        self.to_hidden[rows] = raw @ matrix
        for total, lost, words in self._parts():
            part = raw[:, words]
            if lost is not None:
                _store(total.float().add_(lost).add_(part.t() @ states), total, lost)
            elif total.dtype == part.dtype:
                total.addmm_(part.t(), states)
            else:
                total += part.t() @ states

    def result(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return both, multiplied by a scalar; consumes the object."""
        if factor is not None:
            self.to_hidden.mul_(factor)
            for total, lost, _ in self._parts():
                if lost is None:
                    total.mul_(factor)
                else:
                    total.copy_(total.float().add_(lost).mul_(factor))
        return self.to_hidden, self.to_weight

    def _parts(self) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
        """Yield (sums `[v, H]`, their rounding errors, their rows) in parts: no second `[V, H]`."""
        if self.to_weight is not None:
            for start in range(0, len(self.to_weight), 4096):
                words = slice(start, start + 4096)
                yield self.to_weight[words], None if self.lost is None else self.lost[words], words


def _store(exact: Tensor, total: Tensor, lost: Tensor) -> None:
    """Store float32 values as a sum in 16 bits and what it loses; `exact` is overwritten."""
    total.copy_(exact)
    lost.copy_(exact.sub_(total))
