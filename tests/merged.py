"""Distributions of groups of tokens by their definition, for tests."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(logprobs: Tensor, token_ids: Tensor, groups: Sequence[range]) -> Tensor:
    """Merge log-probs `[n, V]`, row k of which predicts token k, to a row a group, `[G, V]`.

    By the chain rule: the last position's distribution times the probability of the group's earlier
    tokens, which is the probability of the group with any last token (TRL's "bayesian").
    """
    rows = []
    for group in groups:
        *earlier, last = group
        rows.append(logprobs[last] + sum(logprobs[k, token_ids[k]] for k in earlier))
    return torch.stack(rows)
