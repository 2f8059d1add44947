"""Truncation of a distribution by top-k and top-p, as samplers apply it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptMass:
    """Log of the mass of the tokens that a sampler with top-k and top-p can draw.

    Top-k comes first; the nucleus is then the smallest set of the most probable tokens whose share
    of the mass of the top k is at least top-p.

    Args:
        top_p: Nucleus mass, in (0, 1].
        top_k: Number of candidates; 0 keeps all.
    """

    top_p: float = 1.0
    top_k: int = 0

    @torch.no_grad()
    def __call__(self, logprobs: Tensor, _: Tensor | None = None) -> Tensor:
        """Return the log mass `[n]`, nats, of full log-probs `[n, V]`."""
        if 0 < self.top_k < logprobs.shape[-1]:
            likely = logprobs.topk(self.top_k).values.exp()
        else:
            likely = logprobs.sort(descending=True).values.exp()
        total = likely.sum(-1, keepdim=True)
        before = likely.cumsum(-1) - likely  # mass of the more probable tokens
        return (likely * (before < self.top_p * total)).sum(-1).log()
