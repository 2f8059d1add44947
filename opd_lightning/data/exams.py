"""A task's questions as a stream: texts to be written, then texts to be read."""

from __future__ import annotations

from collections.abc import Iterator

from opd_lightning.data.engines import Engines
from opd_lightning.data.evaluation import EvaluationBatch, EvaluationStream
from opd_lightning.data.likelihood import LikelihoodBatch, LikelihoodStream
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.harness.exam import Exam
from opd_lightning.types import Prompt

AT_ONCE = 256  # questions per call of the engine, as for other suites


class ExamStream:
    """One stream for every way of sampling that the task asks for, and one of what it has read.

    Questions are prompts that are named by their number.
    """

    def __init__(
        self,
        suite: str,
        exam: Exam,
        *,
        writer: RolloutWriter,
        engines: Engines,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        pad_id: int,
    ) -> None:
        self.parts: list[EvaluationStream | LikelihoodStream] = []
        for sampling in dict.fromkeys(writing.sampling for writing in exam.writings):
            chosen = [(i, w) for i, w in enumerate(exam.writings) if w.sampling == sampling]
            written = EvaluationStream(
                suite,
                [Prompt(id=str(i), messages=()) for i, _ in chosen],
                [writing.context_ids for _, writing in chosen],
                writer=writer,
                engines=engines,
                sampling=sampling,
                samples=1,
                batch_size=AT_ONCE,
                seed=seed,
                ranks=ranks,
            )
            self.parts.append(written)
        texts = enumerate(exam.readings)
        read = LikelihoodStream(
            suite,
            [Prompt(id=str(i), messages=(), response_ids=tuple(r.text_ids)) for i, r in texts],
            [reading.context_ids for reading in exam.readings],
            writer=writer,
            batch_size=batch_size,
            ranks=ranks,
            pad_id=pad_id,
        )
        self.parts.append(read)

    def __len__(self) -> int:
        """Batches, as many on every rank."""
        return sum(map(len, self.parts))

    @property
    def rows(self) -> int:
        """Questions to answer on this rank."""
        return sum(part.rows for part in self.parts)

    def __iter__(self) -> Iterator[EvaluationBatch | LikelihoodBatch]:
        for part in self.parts:
            yield from part
