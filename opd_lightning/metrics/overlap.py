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
        known = teacher.top_logprobs[mask]
        theirs = theirs.masked_fill(~known.isfinite(), -1)  # a server may tell fewer than asked
        same = ours[:, :, None] == theirs[:, None, :]
        # A token stands in a set once: its place there is the only one.
        found, place = same.view(torch.uint8).max(dim=2)
        shared = found.bool()
        size = shared.sum(dim=1)
        own = student.top_logprobs.detach()[mask].float()
        other = torch.where(shared, known.gather(1, place), 0.0).float()
        gap = (other - own).mul_(shared)
        p, p_scale = _on_it(own, shared)
        q, q_scale = _on_it(other, shared)
        p_mass, q_mass = p.sum(dim=1), q.sum(dim=1)
        # sum of p/p_mass (log(q/q_mass) - log(p/p_mass)), whatever the scales are
        advantage = (p * gap).sum(dim=1) / p_mass + (p_mass / q_mass).log() + p_scale - q_scale
        self._add(
            tokens=len(ours),
            shared=size > 0,
            ratio=size.double() / ours.shape[1],
            student_mass=p_mass * p_scale.exp(),
            teacher_mass=q_mass * q_scale.exp(),
            advantage=torch.where(size > 0, advantage / size, 0.0),
            teacher_weighted=(q * gap).sum(dim=1) * q_scale.exp() / -size.clamp_min(1),
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


def _on_it(logprobs: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities `[N, K]` on O and 0 elsewhere, scaled to 1 at most; the scale's log `[N]`."""
    largest = logprobs.masked_fill(~shared, -torch.inf).amax(dim=1, keepdim=True)
    return (logprobs - largest).clamp_max_(0.0).exp_().mul_(shared), largest[:, 0]
