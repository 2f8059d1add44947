"""Confidence intervals of means over prompts, and pass@k."""

from __future__ import annotations

from math import comb

import numpy as np
import torch
from torch import Tensor

from opd_lightning.errors import UserError

RESAMPLES = 2000
COVERAGE = 0.95
_BLOCK = 2**22  # draws at a time, to bound memory


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 95 % percentile bootstrap interval of the mean of `values [P]`.

    The resamples are the same for equal P: ranks and resumed runs agree, and steps of a run are
    compared on the same resamples.
    """
    pool = values.double().cpu().numpy()
    draw = np.random.default_rng(0)
    rows = max(1, _BLOCK // len(pool))
    means = np.concatenate(
        [
            pool[draw.integers(len(pool), size=(min(rows, RESAMPLES - done), len(pool)))].mean(1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return torch.tensor(low), torch.tensor(high)


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Compute unbiased pass@k by problem, `[P, n]` bool -> `[P]` float64 (Chen et al. 2107.03374).

        1 - C(n - c, k) / C(n, k)   with c correct samples of n

    is the share of all subsets of k samples with a correct one; at k = n it is plain pass@n.

    Raises:
        UserError: If k is not from 1 to n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise UserError(f"pass@k: k is {k}, expected 1 to {n}, the number of samples")
    subsets = comb(n, k)
    # Counted in integers and rounded once.
    table = [(subsets - comb(n - c, k)) / subsets for c in range(n + 1)]
    counts = correct.long().sum(dim=1)
    return torch.tensor(table, dtype=torch.float64, device=correct.device)[counts]
