"""Attention over packed sequences in plain PyTorch operations, for checks on the CPU.

Replaces flash attention without a GPU: same call signature, with sequence bounds as its only mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

# Names registered with transformers, which builds no masks for unknown kernels.
VARLEN = "opd_varlen"
BOUNDS = "opd_varlen_bounds"


class ReachedError(Exception):
    """The first call of an attention kernel.

    Args:
        has_bounds: Whether it got the bounds of sequences.
    """

    def __init__(self, has_bounds: bool) -> None:
        super().__init__()
        self.has_bounds = has_bounds


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs of causal attention, `[1, T, heads, D]`, as flash attention does.

    Where a sequence has more keys than queries, its queries are those of its last tokens.

    Args:
        module: The attention layer; not read.
        query: `[1, heads, T, D]`.
        key: `[1, key heads, K, D]`.
        value: Likewise.
        attention_mask: None.
        scaling: Factor of the products; None for 1 / sqrt(D).
        sliding_window: Number of tokens that a token sees, itself included.
        softcap: Products become softcap * tanh(products / softcap).
        s_aux: `[heads]` logits of attention sinks, which take a share and return nothing.
        cu_seq_lens_q: `[B + 1]` where sequences begin among the queries, and T.
        cu_seq_lens_k: Likewise among the keys, and K.
    """
    assert cu_seq_lens_q is not None
    assert cu_seq_lens_k is not None
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, keys = cu_seq_lens_q.diff().tolist(), cu_seq_lens_k.diff().tolist()
    outputs = []
    split = (query.split(lengths, dim=2), key.split(keys, dim=2), value.split(keys, dim=2))
    for q, k, v in zip(*split, strict=True):
        scores = factor * (q @ k.transpose(2, 3)).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        earlier = k.shape[2] - q.shape[2]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(earlier)
        if sliding_window is not None:
            seen = seen.triu(1 - sliding_window + earlier)
        scores = scores.masked_fill(~seen, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=3)
        shares = scores.softmax(dim=3)[..., : k.shape[2]]
        outputs.append(shares.to(v.dtype) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _reach(*_: Any, cu_seq_lens_q: Tensor | None = None, **__: Any) -> None:
    """Raise ReachedError in place of attention."""
    raise ReachedError(cu_seq_lens_q is not None)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(BOUNDS, _reach)
