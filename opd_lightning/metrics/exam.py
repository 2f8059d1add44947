"""Answers to a task's questions, put together over ranks, and graded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.types import Rollout, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.harness.exam import Exam


class ExamScores(Metric):
    """What a task of lm-evaluation-harness makes of the student's answers.

    Every question has a place, which is zero where another rank answers it: sums over ranks put the
    sheet together, and every rank grades all of it. A rollout's prompt is named by its question's
    number among the exam's readings, or among its writings.
    """

    judged_by: ClassVar = "score"
    full_state_update = False
    read: Tensor  # [readings, 2] float64: nats; 1 where the text is what a greedy model writes
    written: Tensor  # [writings, 1 + longest] int32: the number of tokens, and the tokens

    def __init__(self, exam: Exam) -> None:
        super().__init__()
        self.exam = exam
        longest = max((w.sampling.max_new_tokens for w in exam.writings), default=0)
        read = torch.zeros(len(exam.readings), 2, dtype=torch.float64)
        written = torch.zeros(len(exam.writings), 1 + longest, dtype=torch.int32)
        self.add_state("read", read, dist_reduce_fx="sum")
        self.add_state("written", written, dist_reduce_fx="sum")

    @property
    def reads(self) -> bool:
        """Whether the student itself is asked, and not its engine alone."""
        return len(self.exam.readings) > 0

    def update(self, rollouts: Sequence[Rollout], likelihoods: Tensor | None = None) -> None:
        """Answers to writings, or `likelihoods [B, 2]` of the texts that were to be read."""
        for row, rollout in enumerate(rollouts):
            place, ids = int(rollout.prompt.id), rollout.response_ids
            if likelihoods is None:
                line = torch.tensor([len(ids), *ids], dtype=torch.int32)
                self.written[place, : len(line)] = line
            elif not rollout.dropped:
                self.read[place] = likelihoods[row]

    def compute(self) -> dict[str, Tensor]:
        """See `Exam.grade`."""
        likelihoods = [(nats, greedy > 0) for nats, greedy in self.read.tolist()]
        written = [line[1 : 1 + line[0]] for line in self.written.tolist()]
        graded = self.exam.grade(likelihoods, written)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in graded.items()}


def likelihoods_of(texts: RolloutBatch, tokens: TokenScores) -> Tensor:
    """`[B, 2]` float64 of texts whose likeliest tokens are known: see `ExamScores.read`."""
    mask = texts.response_mask
    greedy = (tokens.top_ids[..., 0] == texts.response_ids) | ~mask
    nats = tokens.logprobs.detach().double().sum(dim=1)
    return torch.stack([nats, greedy.all(dim=1).double()], dim=1)
