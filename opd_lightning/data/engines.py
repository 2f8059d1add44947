"""The engines of a run: started on first use, the student's kept up to date, asleep if told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from opd_lightning.data.ahead import RolloutsAhead
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.rollouts.base import Engine
from opd_lightning.rollouts.time_limit import TimeLimit
from opd_lightning.types import Author


class Engines:
    """The student's engine, and the demonstrator's if there is one.

    Args:
        student: Writes the student's responses; None if nothing is sampled.
        teacher: Writes demonstrations with weights of its own.
        push: Brings the student's engine, started, to the newest weights.
        limit: On every call of theirs.

    `ahead` is who may use them beside the trainer.
    """

    def __init__(
        self,
        student: Engine | None,
        teacher: Engine | None,
        push: Callable[[Engine], None],
        limit: TimeLimit | None = None,
    ) -> None:
        self._push = push
        self.limit = limit or TimeLimit()
        self.ahead = RolloutsAhead(lambda: self.limit.is_exceeded)
        self._asleep: list[Engine] = []
        self._sources: dict[int, tuple[ModelSource, int]] = {}
        self._started: list[Engine] = []
        self.by_author: dict[Author, Engine] = {}
        if student is not None:
            self.by_author |= {Author.STUDENT: student, Author.GUIDED: student}
        if teacher is not None:
            self.by_author[Author.TEACHER] = teacher

    def plan(self, author: Author, source: ModelSource, max_length: int) -> None:
        """What to start an author's engine with, once it is needed; it may refuse that now."""
        engine = self.by_author[author]
        engine.check(source, max_length=max_length)
        self._sources[id(engine)] = (source, max_length)

    def prepare(self, authors: Iterable[Author]) -> None:
        """Start or wake the engines of who will write; give the student's its newest weights.

        Whatever they still write for another step is waited for: nobody else may use them then.
        """
        self.ahead.wait()
        for author in dict.fromkeys(authors):
            if author is not Author.RECORDED:
                self._prepare(author)

    def _prepare(self, author: Author) -> None:
        engine = self.by_author[author]
        if engine not in self._started:
            source, max_length = self._sources[id(engine)]
            with self._limit(engine, "start"):
                engine.start(source, max_length=max_length)
            self._started.append(engine)
        if engine in self._asleep:
            with self._limit(engine, "wake"):
                engine.wake()
            self._asleep.remove(engine)
        if author is not Author.TEACHER:
            with self._limit(engine, "load_weights"):
                self._push(engine)

    def rest(self) -> None:
        """Nothing is written until the next `prepare`: who was told to sleep does."""
        for engine in self._started:
            if engine.sleep_while_training and engine not in self._asleep:
                with self._limit(engine, "sleep"):
                    engine.sleep()
                self._asleep.append(engine)

    def _limit(self, engine: Engine, call: str) -> AbstractContextManager[None]:
        return self.limit.of(f"{type(engine).__name__}.{call}")

    def close(self) -> None:
        """Close what was started."""
        self.ahead.close()
        self._asleep.clear()
        while self._started:
            self._started.pop().close()


def push(student: Student, engine: Engine, *, version: int) -> float:
    """Give the engine the student as it is now, and see that it arrived.

    Returns the share of the weights that the engine could prove.
    """
    weights = PushedWeights(student.weights, engine.weights_dtype)
    engine.load_weights(version, weights)
    return weights.check(version, engine.weight_sums())
