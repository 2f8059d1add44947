"""Supervised fine-tuning and sequence-level distillation on given responses."""

from __future__ import annotations

from torch import Tensor

from opd_lightning.losses.reduction import aggregate
from opd_lightning.training.base import DistillationModule
from opd_lightning.types import RolloutBatch


class SFT(DistillationModule):
    """Cross-entropy on responses: `L = -(1/Z) sum_t log pi_theta(y_t)`.

    `data.mix.recorded: 1` trains on the responses of the prompt file (SFT); `data.mix.teacher: 1`
    on those of the teacher's engine (SeqKD, 1606.07947), verified with `only_correct`.
    """

    needs_demonstrations = True
    corrects_staleness = True  # demonstrations do not become stale

    def loss(self, batch: RolloutBatch) -> Tensor:
        with self.timer.stage("student"):
            student = self.student.score(batch)
        self.compare_with_engine(batch, student)
        self.token_figures = {"logprob": student.logprobs.detach()}
        mask = batch.response_mask
        return aggregate(-student.logprobs, mask, batch.totals.all, self.aggregation)
