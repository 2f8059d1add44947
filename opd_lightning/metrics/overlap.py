"""Overlap of the top-k tokens of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.metrics.sums import Sums
from opd_lightning.types import TokenScores


class OverlapStatistics(Sums):
    """Overlap of both models' top-k sets per token (Rethinking-OPD, 2604.13016; k = 16 there).

    O is the intersection of the two sets of a token.
    """

    names = ("tokens", "shared", "ratio", "student_mass", "teacher_mass", "advantage",
             "teacher_weighted")  # fmt: skip

    def update(self, student: TokenScores, teacher: TokenScores, mask: Tensor) -> None:
        """Add the tokens of `mask [B, R]`; without top ids of the teacher, nothing."""
        student_ids, teacher_ids = student.top_ids[mask], teacher.top_ids[mask]
        if teacher_ids.shape[1] == 0:
            return
        known = teacher.top_logprobs[mask]
        # A server may return fewer than requested.
        teacher_ids = teacher_ids.masked_fill(~known.isfinite(), -1)
        same = student_ids[:, :, None] == teacher_ids[:, None, :]
        # A token occurs in a set at most once, so its position is unique.
        found, position = same.view(torch.uint8).max(dim=2)
        shared = found.bool()
        size = shared.sum(dim=1)
        own = student.top_logprobs.detach()[mask].float()
        other = torch.where(shared, known.gather(1, position), 0.0).float()
        gap = (other - own).mul_(shared)
        p, p_scale = _scaled_probs(own, shared)
        q, q_scale = _scaled_probs(other, shared)
        p_mass, q_mass = p.sum(dim=1), q.sum(dim=1)
        # sum of p/p_mass (log(q/q_mass) - log(p/p_mass)), independent of the scales
        advantage = (p * gap).sum(dim=1) / p_mass + (p_mass / q_mass).log() + p_scale - q_scale
        self._add(
            tokens=len(student_ids),
            shared=size > 0,
            ratio=size.double() / student_ids.shape[1],
            student_mass=p_mass * p_scale.exp(),
            teacher_mass=q_mass * q_scale.exp(),
            advantage=torch.where(size > 0, advantage / size, 0.0),
            teacher_weighted=(q * gap).sum(dim=1) * q_scale.exp() / -size.clamp_min(1),
        )

    def compute(self) -> dict[str, Tensor]:
        """Return means over tokens, those of the advantages over tokens with a non-empty O.

        `advantage` is the paper's: sum of p_S (log p_T - log p_S) over O, both renormalised on O,
        divided by |O|; it is 0 where the models agree, else negative. `teacher_weighted` is what
        verl logs under that name: p_T (log p_S - log p_T), not renormalised.
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


def _scaled_probs(logprobs: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities `[N, K]` on O, 0 elsewhere, scaled to 1 at most, and log scale `[N]`."""
    largest = logprobs.masked_fill(~shared, -torch.inf).amax(dim=1, keepdim=True)
    return (logprobs - largest).clamp_max_(0.0).exp_().mul_(shared), largest[:, 0]
