"""Comparing distributions with a teacher who tells only some of its log-probs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from opd_lightning.losses.top_k import TopK
from opd_lightning.models.head import Comparison, TopLogprobs
from opd_lightning.models.student import LateComparison
from opd_lightning.teachers.base import Ask, TopKTeacher
from opd_lightning.timing import StepTimer
from opd_lightning.types import RolloutBatch, TokenScores


def announce_likeliest(
    question: Ask, batch: RolloutBatch, function: Any, overlap_top_k: int
) -> None:
    """Announce what `TopKAsker` will ask, unless that depends on what the student says."""
    if function.support != "student":
        width = max(function.k, overlap_top_k)
        question.teacher.prefetch(batch, question.view, top_k=width)


class TopKAsker(NamedTuple):
    """Puts the questions of one comparison to a teacher who knows only some tokens."""

    name: str
    question: Ask
    batch: RolloutBatch
    overlap_top_k: int
    others: dict[str, TokenScores]  # the scores that come with the answer are noted here
    timer: StepTimer

    def comparison(self, function: Any) -> Comparison | LateComparison:
        assert isinstance(function, TopK)  # checked at set-up
        if function.support != "student":
            return Comparison(self._likeliest(function.k), function)

        def ask(ids: Tensor) -> TopLogprobs:
            self.timer.stop("student")  # whose pass is waiting for this answer
            try:
                with self.timer.stage("teacher"):
                    return self._answer(self.overlap_top_k, ids)
            finally:
                self.timer.start("student")

        # What the teacher tells is on the student's top k, and nothing else is known of it: its
        # own likeliest known tokens are the same set, however ties among the student's fall.
        return LateComparison(function.k, ask, replace(function, support="teacher"))

    def _likeliest(self, k: int) -> TopLogprobs:
        known = self._answer(max(k, self.overlap_top_k), None)
        return TopLogprobs(known.ids[:, :k], known.logprobs[:, :k])

    def _answer(self, top_k: int, ids: Tensor | None) -> TopLogprobs:
        teacher = self.question.teacher
        assert isinstance(teacher, TopKTeacher)  # checked at set-up
        scores, known = teacher.score_top(self.batch, self.question.view, top_k=top_k, ids=ids)
        self.others.setdefault(
            self.name,
            replace(
                scores,
                top_ids=scores.top_ids[..., : self.overlap_top_k],
                top_logprobs=scores.top_logprobs[..., : self.overlap_top_k],
            ),
        )
        return known
