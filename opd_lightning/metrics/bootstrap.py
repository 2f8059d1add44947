"""How sure a mean over prompts is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000
COVERAGE = 0.95
_AT_ONCE = 2**22  # draws, to bound memory


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval (95 %) of the mean of `values [P]`, P prompts drawn anew.

    Drawn alike for the same P: ranks and resumed runs agree, and two steps of a run are compared
    on the same resamples.
    """
    pool = values.double().cpu().numpy()
    draw = np.random.default_rng(0)
    rows = max(1, _AT_ONCE // len(pool))
    means = np.concatenate(
        [
            pool[draw.integers(len(pool), size=(min(rows, RESAMPLES - done), len(pool)))].mean(1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return torch.tensor(low), torch.tensor(high)
