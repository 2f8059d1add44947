"""Engines of a run: started on first use, given new weights, asleep while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from opd_lightning.data.prefetch import RolloutPrefetch
from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.rollouts.base import Engine
from opd_lightning.rollouts.time_limit import TimeLimit
from opd_lightning.types import Author


class Engines:
    """The student's engine and, optionally, the demonstrator's.

    Args:
        student: Writes the student's responses; None if nothing is sampled.
        teacher: Writes demonstrations, with separate weights.
        push: Loads the newest weights into the student's started engine.
        limit: Time limit on every call of an engine.

    `prefetch` prefetches rollouts and is the only other user of the engines.
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
        self.prefetch = RolloutPrefetch(lambda: self.limit.is_exceeded)
        self._asleep: list[Engine] = []
        self._sources: dict[int, tuple[ModelSource, int]] = {}
        self._started: list[Engine] = []
        self.by_author: dict[Author, Engine] = {}
        if student is not None:
            self.by_author |= {Author.STUDENT: student, Author.GUIDED: student}
        if teacher is not None:
            self.by_author[Author.TEACHER] = teacher

    def plan(self, author: Author, source: ModelSource, max_length: int) -> None:
        """Set what an author's engine starts with; raise UserError if it cannot."""
        engine = self.by_author[author]
        engine.check(source, max_length=max_length)
        self._sources[id(engine)] = (source, max_length)

    def planned_length(self, author: Author) -> int:
        """Return the longest sequence that an author's engine starts for; 0 without a plan."""
        engine = self.by_author.get(author)
        return self._sources[id(engine)][1] if id(engine) in self._sources else 0

    def prepare(self, authors: Iterable[Author]) -> None:
        """Start or wake the engines of `authors`, and push the newest weights to the student's.

        Waits for a running prefetch first: engines take calls from one thread at a time.
        """
        self.prefetch.wait()
        for author in dict.fromkeys(authors):
            if author is not Author.RECORDED:
                self._prepare(author)

    def _prepare(self, author: Author) -> None:
        engine = self.by_author[author]
        if engine not in self._started:
            if id(engine) not in self._sources:
                raise UserError(
                    "data.suites: a suite samples responses, but its engine_length is None, "
                    "expected the tokens of its longest prompt with a response; override it"
                )
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

    def sleep(self) -> None:
        """Put engines with `sleep_while_training` to sleep until the next `prepare`."""
        for engine in self._started:
            if engine.sleep_while_training and engine not in self._asleep:
                with self._limit(engine, "sleep"):
                    engine.sleep()
                self._asleep.append(engine)

    def _limit(self, engine: Engine, call: str) -> AbstractContextManager[None]:
        return self.limit.of(f"{type(engine).__name__}.{call}")

    def close(self) -> None:
        """Close all started engines."""
        self.prefetch.close()
        self._asleep.clear()
        while self._started:
            self._started.pop().close()


def push(student: Student, engine: Engine, *, version: int) -> float:
    """Push the student's current weights to the engine, and check that they arrived.

    Returns:
        The share of the weights that the engine's sums could verify.
    """
    weights = PushedWeights(student.weights, engine.weights_dtype)
    engine.load_weights(version, weights)
    return weights.check(version, engine.weight_sums())
