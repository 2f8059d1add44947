"""From a suite to its stream, and what the engine is asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.data.evaluation import EvaluationStream
from opd_lightning.data.exams import ExamStream
from opd_lightning.data.likelihood import LikelihoodStream
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.suites import EvaluationSuite, LikelihoodSuite, Loaded, Suite
from opd_lightning.harness.exam import Exam
from opd_lightning.harness.task import HarnessTask

if TYPE_CHECKING:
    from opd_lightning.data.datamodule import RolloutDataModule

MeasuringStream = EvaluationStream | LikelihoodStream | ExamStream


def stream_of(
    data: RolloutDataModule, name: str, suite: Suite, loaded: Loaded | Exam
) -> MeasuringStream:
    """What a suite measures, a batch at a time."""
    ranks, pad_id = Ranks.of(data.trainer), data.module.student.source.pad_id
    if isinstance(suite, HarnessTask):
        assert isinstance(loaded, Exam)
        return ExamStream(
            name,
            loaded,
            writer=data.writer(None),
            engines=data.engines,
            batch_size=suite.batch_size,
            seed=data.seed,
            ranks=ranks,
            pad_id=pad_id,
        )
    assert isinstance(loaded, Loaded)
    if isinstance(suite, LikelihoodSuite):
        return LikelihoodStream(
            name,
            *loaded,
            writer=data.writer(None),
            batch_size=suite.batch_size,
            ranks=ranks,
            pad_id=pad_id,
        )
    return EvaluationStream(
        name,
        *loaded,
        writer=data.writer(suite.verifier or data.verifier),
        engines=data.engines,
        sampling=suite.sampling or data.sampling,
        samples=suite.samples,
        batch_size=suite.batch_size,
        seed=data.seed,
        ranks=ranks,
    )


def asks_engine(suite: Suite, loaded: Loaded | Exam) -> bool:
    """Whether responses are written for a suite."""
    if isinstance(loaded, Exam):
        return bool(loaded.writings)
    return isinstance(suite, EvaluationSuite)


def longest_prompt(suite: Suite, loaded: Loaded | Exam) -> int:
    """Tokens of the longest prompt that the engine is given for a suite; 0 if there is none."""
    if isinstance(loaded, Exam):
        return max((len(writing.context_ids) for writing in loaded.writings), default=0)
    return max(map(len, loaded.ids), default=0) if isinstance(suite, EvaluationSuite) else 0


def longest_answer(loaded: Loaded | Exam) -> int:
    """Tokens of the longest answer that a task asks for; 0 for what is no task."""
    writings = loaded.writings if isinstance(loaded, Exam) else []
    return max((writing.sampling.max_new_tokens for writing in writings), default=0)
