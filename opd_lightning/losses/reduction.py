"""From token losses to a micro-batch's scalar; the only place that divides by a count."""

from typing import Literal, assert_never

import torch
from torch import Tensor

from opd_lightning.types import StepTotals

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def aggregate(token_loss: Tensor, mask: Tensor, totals: StepTotals, mode: Aggregation) -> Tensor:
    """This micro-batch's share of the optimiser step's loss; the shares of a step add up to it.

    Args:
        token_loss: `[B, R]`, anything where the mask is False.
        mask: `[B, R]` bool.
        totals: Token and sequence counts of the whole step, over micro-batches and ranks.
        mode: "token-mean" divides the token sum by the step's tokens; "seq-mean-token-mean"
            averages each sequence over its own tokens, then over the step's sequences;
            "seq-mean-token-sum" sums each sequence and averages over the step's sequences.

    Returns:
        A scalar with a graph, exactly 0 for a fully masked batch.
    """
    kept = torch.where(mask, token_loss, 0.0)
    match mode:
        case "token-mean":
            return kept.sum() / max(totals.tokens, 1)
        case "seq-mean-token-mean":
            per_sequence = kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            return per_sequence.sum() / max(totals.sequences, 1)
        case "seq-mean-token-sum":
            return kept.sum() / max(totals.sequences, 1)
    assert_never(mode)
