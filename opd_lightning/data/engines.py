"""The engines of a run: started on first use, the student's kept up to date, asleep if told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from opd_lightning.data.ahead import RolloutsAhead
from opd_lightning.data.suites import EvaluationSuite
from opd_lightning.errors import UserError
from opd_lightning.model_source import ModelSource
from opd_lightning.rollouts.base import Engine
from opd_lightning.rollouts.weight_sums import PushedWeights
from opd_lightning.student import Student
from opd_lightning.time_limit import TimeLimit
from opd_lightning.types import Author

if TYPE_CHECKING:
    from opd_lightning.data.datamodule import RolloutDataModule


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


def plan_engines(data: RolloutDataModule, longest: int, budget: int) -> None:
    """Engines are started for the longest sequence that any stream may ask of them.

    Args:
        data: Whose engines.
        longest: Tokens of the longest prompt.
        budget: Tokens of the longest answer to a task.
    """
    suites = [s for stage in data.suites.values() for s in stage.values()]
    samplings = [s.sampling for s in suites if isinstance(s, EvaluationSuite)]
    lengths = [s.max_new_tokens for s in [data.sampling, *filter(None, samplings)]]
    if data.engine is not None:
        most = longest + max(budget, *lengths)
        data.engines.plan(Author.STUDENT, data.module.student.source, most)
    if data.teacher is not None:
        budget = data.teacher.max_new_tokens or data.sampling.max_new_tokens
        source = ModelSource(data.teacher.path, role="data.teacher")
        data.engines.plan(Author.TEACHER, source, longest + budget)


def check_engines(data: RolloutDataModule, stage: str, *, evaluated: bool) -> None:
    """There is an engine where one is needed, and what it is told fits the run."""
    fits = stage == "fit"
    if data.engine is None and (evaluated or (fits and data.mix.samples)):
        raise UserError(
            "data.engine: got nothing, but responses must be sampled; set an engine, or train "
            "with data.mix.recorded 1 and without validation"
        )
    if data.teacher is not None and data.teacher.engine.sleep_while_training:
        raise UserError(
            "data.teacher.engine: sleep_while_training is on, but the teacher's weights, which "
            "sleeping drops, are never pushed; leave it out"
        )
    if fits and data.max_staleness:
        _check_ahead(data)


def _check_ahead(data: RolloutDataModule) -> None:
    """Rollouts may be written beside training, by weights that are one step old."""
    if data.engine is not None and data.engine.sleep_while_training:
        raise UserError(
            "data.max_staleness: got 1, so the engine writes while the trainer works, but its "
            "sleep_while_training is on; choose one of them"
        )
    if data.mix.samples and not data.module.corrects_staleness:
        raise UserError(
            f"data.max_staleness: got 1, but {type(data.module).__name__} takes every rollout for "
            "the newest policy's; add opd_lightning.rules.TruncatedImportance (or IcePop) to its "
            "rules, or set model.init_args.surrogate.ratio_to to 'sampler'"
        )
