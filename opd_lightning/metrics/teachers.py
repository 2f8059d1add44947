"""Statistics of the signal by teacher, where domains have teachers of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opd_lightning.metrics.sums import NamedMeans
from opd_lightning.types import RolloutBatch, TokenScores


class TeacherStatistics(NamedMeans):
    """Share of tokens and means of d_t and |d_t| for every domain's teacher."""

    def update(
        self,
        batch: RolloutBatch,
        domains: Sequence[str],
        student: TokenScores,
        teacher: TokenScores,
        mask: Tensor,
    ) -> None:
        """Add the tokens of `mask [B, R]`, those in the loss of the method.

        Args:
            batch: The micro-batch.
            domains: Domains with a teacher, the same in all calls; the first 100 have figures.
            student: Scores of the student.
            teacher: Scores of the teachers.
            mask: `[B, R]` bool.
        """
        ratio = teacher.logprobs - student.logprobs.detach()
        of_row = [rollout.prompt.domain for rollout in batch.rollouts]
        for domain in domains:
            rows = mask.new_tensor([name == domain for name in of_row])
            here = mask & rows[:, None]
            self._count(f"teacher/{domain}/share", here[mask])
            self._count(f"teacher/{domain}/log_ratio_mean", ratio[here])
            self._count(f"teacher/{domain}/log_ratio_abs_mean", ratio[here].abs())
