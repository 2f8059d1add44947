"""Comparison with teachers that provide only part of their log-probs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from opd_lightning.losses.top_k import TopK
from opd_lightning.models.head import Comparison, TopLogprobs
from opd_lightning.models.student import LateComparison
from opd_lightning.teachers.base import Ask, provides_top_k
from opd_lightning.timing import StepTimer
from opd_lightning.types import RolloutBatch, TokenScores


def prefetch_top_k(ask: Ask, batch: RolloutBatch, function: Any, overlap_top_k: int) -> None:
    """Prefetch what `TopKQuery` will request, unless it depends on the student's scores."""
    if function.support != "student":
        width = max(function.k, overlap_top_k)
        ask.teacher.prefetch(batch, ask.view, top_k=width)


class TopKQuery(NamedTuple):
    """Requests of one comparison to a teacher of top-k tokens."""

    name: str
    ask: Ask
    batch: RolloutBatch
    overlap_top_k: int
    others: dict[str, TokenScores]  # receives the scores that come with the log-probs
    timer: StepTimer

    def comparison(self, function: Any) -> Comparison | LateComparison:
        assert isinstance(function, TopK)  # checked at set-up
        if function.support != "student":
            return Comparison(self._teacher_top_k(function.k), function)

        def query(ids: Tensor) -> TopLogprobs:
            self.timer.stop("student")  # its forward pass waits for the teacher
            try:
                with self.timer.stage("teacher"):
                    return self._query(self.overlap_top_k, ids)
            finally:
                self.timer.start("student")

        # The teacher's log-probs are known only on the student's top k. Its top k of the known
        # tokens is therefore the same set, regardless of ties among the student's log-probs.
        return LateComparison(function.k, query, replace(function, support="teacher"))

    def _teacher_top_k(self, k: int) -> TopLogprobs:
        known = self._query(max(k, self.overlap_top_k), None)
        return TopLogprobs(known.ids[:, :k], known.logprobs[:, :k])

    def _query(self, top_k: int, ids: Tensor | None) -> TopLogprobs:
        teacher = self.ask.teacher
        assert provides_top_k(teacher)  # checked at set-up
        scores, known = teacher.score_top(self.batch, self.ask.view, top_k=top_k, ids=ids)
        self.others.setdefault(
            self.name,
            replace(
                scores,
                top_ids=scores.top_ids[..., : self.overlap_top_k],
                top_logprobs=scores.top_logprobs[..., : self.overlap_top_k],
            ),
        )
        return known
