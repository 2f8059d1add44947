"""Divisors of a step's loss that are known only after its last micro-batch.

A mean over the step that divides its whole loss need not be known before the first backward pass:
the gradients, which are sums over micro-batches, are divided before the optimiser's step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from opd_lightning.processes import concatenate_ranks
from opd_lightning.rules.base import Rule
from opd_lightning.rules.common import step_mean


class StepDivisors:
    """Means over a step, from sums and counts of its micro-batches on all ranks."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, rows: Tensor) -> None:
        """Add a micro-batch's rows of (sum, count), `[M, 2]`, to those of a mean."""
        self._rows[name].append(rows.double())

    def factor(self) -> float:
        """Return the factor of the step's loss, and begin a new step. Collective."""
        means = [step_mean(concatenate_ranks(torch.cat(rows))) for rows in self._rows.values()]
        self._rows.clear()
        return 1 / float(torch.stack(means).prod()) if means else 1.0


def divide_the_loss(rules: Iterable[Rule], step: int) -> bool:
    """Return whether statistics of this step are means that only divide its whole loss."""
    divided = False
    for rule in rules:
        if rule.observes(step) and not rule.divides:
            return False
        if divided and not rule.ignores_weights:
            return False
        divided |= rule.observes(step)
    return True
