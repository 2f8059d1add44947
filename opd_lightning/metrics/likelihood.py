"""How likely given texts are, and how far the student's predictions of them moved."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from opd_lightning.metrics.sums import Sums


class LikelihoodScores(Sums):
    """Perplexity, and KL(start || now), over the tokens of all texts, each of the same weight."""

    judged_by: ClassVar = "log_likelihood"
    reads: ClassVar = True  # the student itself is asked
    names = ("tokens", "logprobs", "divergence")

    def __init__(self, compares: bool) -> None:
        super().__init__()
        self.compares = compares  # with the start

    def update(self, logprobs: Tensor, divergence: Tensor) -> None:
        """Log-probs `[N]` of a batch's tokens, and KL(start || now) where they are predicted.

        Nats both; N may be 0. Without a start the divergence is 0.
        """
        self._add(tokens=len(logprobs), logprobs=logprobs.double(), divergence=divergence.double())

    def compute(self) -> dict[str, Tensor]:
        """`log_likelihood` (mean, nats per token), `perplexity` and, if it compares, `kl`."""
        sums = self._totals()
        mean = sums["logprobs"] / sums["tokens"]
        result = {"log_likelihood": mean, "perplexity": torch.exp(-mean)}
        if self.compares:
            result["kl"] = sums["divergence"] / sums["tokens"]
        return result
