"""Confidence intervals of means over prompts, and pass@k."""

from __future__ import annotations

from math import comb
from statistics import NormalDist

import torch
from torch import Tensor

from opd_lightning.errors import UserError

COVERAGE = 0.95


def wilson(mean: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return Wilson's 95 % interval of a mean in [0, 1] over `count` independent trials."""
    z = NormalDist().inv_cdf((1 + COVERAGE) / 2)
    centre = mean + z**2 / (2 * count)
    margin = z * torch.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + side * margin) / (1 + z**2 / count) for side in (-1, 1))
    return low.clamp(min=0).minimum(mean), high.clamp(max=1).maximum(mean)  # despite rounding


def interval(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 95 % interval of the mean of `scores [P, samples]` in [0, 1], over all prompts.

    It is Wilson's, which holds near 0 and 1, for an effective number of independent responses:

        n = mean (1 - mean) / (variance of the prompts' averages / P)

    because samples of a prompt are correlated. n is at least P, and equals P if all averages are
    equal. For scores of 0 or 1, n is at most the number of responses, so that with one sample per
    prompt it is P.
    """
    scores = scores.double().cpu()
    averages = scores.mean(dim=1)
    count, mean = len(averages), averages.mean()
    is_binary = bool(((scores == 0) | (scores == 1)).all())
    n = torch.tensor(count, dtype=torch.float64)
    if averages.min() < averages.max():
        n = (mean * (1 - mean) * count / averages.var()).clamp(min=count)
    return wilson(mean, n.clamp(max=scores.numel()) if is_binary else n)


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
