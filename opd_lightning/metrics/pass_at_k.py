"""How often at least one of k samples is right."""

from math import comb

import torch
from torch import Tensor

from opd_lightning.errors import UserError


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Unbiased pass@k of each problem, `[P, n]` bool -> `[P]` float64 (Chen et al., 2107.03374).

        1 - C(n - c, k) / C(n, k)   with c correct samples of n

    is the share of all subsets of k samples with a correct one; at k = n it is plain pass@n.

    Raises:
        UserError: k is not from 1 to n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise UserError(f"pass@k: k is {k}, expected 1 to {n}, the number of samples")
    subsets = comb(n, k)
    # Counted in integers and rounded once.
    table = [(subsets - comb(n - c, k)) / subsets for c in range(n + 1)]
    counts = correct.long().sum(dim=1)
    return torch.tensor(table, dtype=torch.float64, device=correct.device)[counts]
