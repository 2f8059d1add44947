"""Reduction of token losses to a scalar, divided by counts of the whole step.

Only statistics that are known after the last micro-batch are divided out elsewhere, of the
gradients (`training/step_divisors.py`).
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

from opd_lightning.types import Totals

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "mask-mean"]


def aggregate(token_loss: Tensor, mask: Tensor, totals: Totals, mode: Aggregation) -> Tensor:
    """Return a micro-batch's share of the optimiser step's loss, which is the sum of the shares.

    Args:
        token_loss: `[B, R]`; values where the mask is False are ignored.
        mask: `[B, R]` bool, the selected tokens: response tokens that no rule left out.
        totals: Token and sequence counts of the whole step, over micro-batches and ranks.
        mode: "token-mean" divides the token sum by the step's response tokens, selected or not;
            "seq-mean-token-mean" averages each sequence over its selected tokens, then over the
            step's sequences; "seq-mean-token-sum" sums each sequence and averages over the step's
            sequences; "mask-mean" divides by the selected tokens, which `totals.tokens` must then
            count.

    Returns:
        A scalar with a graph, exactly 0 for a fully masked batch.
    """
    kept = torch.where(mask, token_loss, 0.0)
    match mode:
        case "token-mean" | "mask-mean":
            return kept.sum() / max(totals.tokens, 1)
        case "seq-mean-token-mean":
            per_sequence = kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            return per_sequence.sum() / max(totals.sequences, 1)
        case "seq-mean-token-sum":
            return kept.sum() / max(totals.sequences, 1)
    assert_never(mode)
