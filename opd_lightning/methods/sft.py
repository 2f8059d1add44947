"""Supervised fine-tuning on recorded responses."""

from torch import Tensor

from opd_lightning.methods.base import DistillationModule
from opd_lightning.types import RolloutBatch


class SFT(DistillationModule):
    """Cross-entropy on the responses of the prompt file (`data.recorded: true`).

    L = -(1/Z) sum_t log pi_theta(y_t)
    """

    def token_losses(self, batch: RolloutBatch) -> Tensor:
        return -self.score_student(batch).logprobs
