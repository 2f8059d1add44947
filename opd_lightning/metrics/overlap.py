"""How much the likeliest tokens of student and teacher have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.metrics.sums import Sums
from opd_lightning.types import TokenScores


class OverlapStatistics(Sums):
    """Of the top-k sets of both models, at every token (Rethinking-OPD, 2604.13016; k = 16 there).

    O is what a token's two sets share.
    """

    names = ("tokens", "shared", "ratio", "student_mass", "teacher_mass", "advantage",
             "teacher_weighted")  # fmt: skip

    def update(self, student: TokenScores, teacher: TokenScores, mask: Tensor) -> None:
        """`mask [B, R]` chooses the tokens; a teacher that ranks nothing adds nothing."""
        ours, theirs = student.top_ids[mask], teacher.top_ids[mask]
        if theirs.shape[1] == 0:
            return
        known = teacher.top_logprobs[mask].float()
        theirs = theirs.masked_fill(~known.isfinite(), -1)  # a server may tell fewer than asked
        same = ours[:, :, None] == theirs[:, None, :]  # [N, K, K']
        # A token stands in a set once: its place there is the only one.
        found, place = same.view(torch.uint8).max(dim=2)
        shared = found.bool()
        count = shared.sum(dim=1)
        own = student.top_logprobs.detach()[mask].float()
        other = torch.where(shared, known.gather(1, place), 0.0)
        self._add(
            tokens=len(ours),
            shared=count > 0,
            ratio=shared.double().mean(dim=1),
            student_mass=(own.exp() * shared).sum(dim=1),
            teacher_mass=(other.exp() * shared).sum(dim=1),
            advantage=_mean(_renormalised(own, shared), _renormalised(other, shared), shared),
            teacher_weighted=_mean(other, own, shared),
        )

    def compute(self) -> dict[str, Tensor]:
        """Means over tokens; the advantages over those whose sets share anything.

        `advantage` is the paper's: sum of p_S (log p_T - log p_S) over O, both renormalised there,
        divided by |O|; it rises to 0 as the two agree. `teacher_weighted` is what verl logs under
        that name: p_T (log p_S - log p_T), without renormalising.
        """
        sums = self._totals()
        if sums["tokens"] == 0:
            return {}
        names = ("ratio", "student_mass", "teacher_mass")
        result = {f"overlap/{name}": sums[name] / sums["tokens"] for name in names}
        if sums["shared"] > 0:
            for name in ("advantage", "teacher_weighted"):
                result[f"overlap/{name}"] = sums[name] / sums["shared"]
        return result


def _renormalised(logprobs: Tensor, shared: Tensor) -> Tensor:
    return logprobs.masked_fill(~shared, -torch.inf).log_softmax(dim=1)


def _mean(weights: Tensor, others: Tensor, shared: Tensor) -> Tensor:
    """Mean over O of w (other - w) in log-probs `[N, K]`, as `[N]`; 0 where O is empty."""
    terms = torch.where(shared, weights.exp() * (others - weights), 0.0)
    return terms.sum(dim=1) / shared.sum(dim=1).clamp_min(1)
