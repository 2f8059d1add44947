"""Mask of the tokens behind a point from which the teacher no longer discriminates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, kept, rate
from opd_lightning.rules.masks import positions

LEAST = 1e-12  # lower bound of a residual sum of squares: equal values leave only rounding


@dataclass(frozen=True)
class ChangePointMask(Rule):
    """Keeps the tokens of a response before the teacher's margin falls (2605.13643).

        margin = largest - second largest pi_T(v) of the student's top_k tokens v
        M_1 .. M_n = its means over blocks of tokens
        RSS_j = sum of squares of M_1 .. M_j and of M_j+1 .. M_n about their means;  RSS_n about one
        cut behind block j = argmin RSS_j, among those where the mean falls,
            if n log(RSS_n / RSS_j) > penalty log n

    From secondary sources: the margin, a change point as in BIC, and the cut. Chosen here: blocks
    of equal length (the authors use sentences), probabilities, `top_k`, `least`, and BIC's penalty
    for one more mean and one location. It reads full distributions: needs a teacher in this
    process.

    Rates: kept; cut, tokens of responses that are cut.

    Args:
        top_k: Number of the student's most probable tokens, at least 2.
        block: Tokens of a block.
        penalty: Factor of log n, 0 or more. Infinity keeps all tokens.
        least: Fewest blocks on each side of the cut.
    """

    top_k: int = 16
    block: int = 32
    penalty: float = 2.0
    least: int = 3

    comparison: ClassVar[str] = "teacher_margin"  # key in `Scored.values`

    def __post_init__(self) -> None:
        check(self, "top_k", self.top_k >= 2, "at least 2")
        check(self, "block", self.block >= 1, "at least 1")
        check(self, "penalty", self.penalty >= 0, "0 or more")
        check(self, "least", self.least >= 1, "at least 1")

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.comparison: Compare("teacher", Margin(self.top_k))}

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        mask = scored.batch.response_mask
        blocks = positions(scored).clamp(min=0) // self.block
        empty = signal.weight.new_zeros(len(mask), -(-mask.shape[1] // self.block)).double()
        margins = torch.where(mask, scored.values[self.comparison], 0.0).double()
        tokens = empty.scatter_add(1, blocks, mask.double())
        means = empty.scatter_add(1, blocks, margins) / tokens.clamp(min=1)
        count = (tokens > 0).sum(dim=1)
        first = before_fall(means, count, penalty=self.penalty, least=self.least)
        keep = blocks < first[:, None]
        return kept(signal, keep), {
            "change_point/kept": rate(scored, keep),
            "change_point/cut": rate(scored, (first < count)[:, None]),
        }


@dataclass(frozen=True)
class Margin:
    """Margin of the teacher over the student's top k tokens.

    `student_logprobs [n, V], teacher_logprobs [n, V] -> [n]`, in [0, 1], without a gradient.
    """

    k: int

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        top = student_logprobs.detach().topk(min(self.k, student_logprobs.shape[-1])).indices
        first, second = teacher_logprobs.gather(-1, top).exp().topk(2).values.unbind(-1)
        return first - second


def before_fall(values: Tensor, count: Tensor, *, penalty: float, least: int) -> Tensor:
    """Return the number of values before the fall of their mean; all of them without one.

    Args:
        values: `[B, N]` float64, 0 behind the first `count` of a row.
        count: `[B]` int64.
        penalty: Factor of log n that the fit has to gain, in units of n log RSS.
        least: Fewest values on each side.

    Returns:
        `[B]` int64.
    """
    if values.shape[1] < 2 * least:
        return count
    before = torch.arange(1, values.shape[1], device=values.device)  # [N - 1]
    after = count[:, None] - before
    squares, total = values.square().sum(dim=1), values.sum(dim=1)
    first = values.cumsum(dim=1)[:, :-1]
    last = total[:, None] - first
    whole = (squares - total.square() / count.clamp(min=1)).clamp(min=LEAST)
    split = squares[:, None] - first.square() / before - last.square() / after.clamp(min=1)
    falls = (before >= least) & (after >= least) & (first / before > last / after.clamp(min=1))
    split = torch.where(falls, split.clamp(min=LEAST), torch.inf)
    best, place = split.min(dim=1)
    gain = count * (whole.log() - best.log())
    return torch.where(gain > penalty * count.clamp(min=1).log(), place + 1, count)
