"""The engines of a run: started on first use, and the student's kept up to date."""

from __future__ import annotations

from collections.abc import Callable

from opd_lightning.model_source import ModelSource
from opd_lightning.rollouts.base import Engine
from opd_lightning.rollouts.weight_sums import PushedWeights
from opd_lightning.student import Student
from opd_lightning.types import Author


class Engines:
    """The student's engine, and the demonstrator's if there is one.

    Args:
        student: Writes the student's responses; None if nothing is sampled.
        teacher: Writes demonstrations with weights of its own.
        push: Brings the student's engine, started, to the newest weights.
    """

    def __init__(
        self, student: Engine | None, teacher: Engine | None, push: Callable[[Engine], None]
    ) -> None:
        self._push = push
        self._sources: dict[int, tuple[ModelSource, int]] = {}
        self._started: list[Engine] = []
        self.by_author: dict[Author, Engine] = {}
        if student is not None:
            self.by_author |= {Author.STUDENT: student, Author.GUIDED: student}
        if teacher is not None:
            self.by_author[Author.TEACHER] = teacher

    def plan(self, author: Author, source: ModelSource, max_length: int) -> None:
        """What to start an author's engine with, once it is needed."""
        self._sources[id(self.by_author[author])] = (source, max_length)

    def prepare(self, author: Author) -> None:
        """Start an author's engine unless it runs; give the student's its newest weights."""
        engine = self.by_author[author]
        if engine not in self._started:
            source, max_length = self._sources[id(engine)]
            engine.start(source, max_length=max_length)
            self._started.append(engine)
        if author is not Author.TEACHER:
            self._push(engine)

    def close(self) -> None:
        """Close what was started."""
        while self._started:
            self._started.pop().close()


def push(student: Student, engine: Engine, *, version: int) -> None:
    """Give the engine the student as it is now, unless it has it; see that it arrived."""
    if engine.version != version:
        weights = PushedWeights(student.weights(), engine.weights_dtype)
        engine.load_weights(version, weights)
        weights.check(version, engine.weight_sums())
