"""Who writes the responses of a step, as a function of (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.seeding import AUTHOR, GUIDANCE, derive_seed
from opd_lightning.types import Author


@dataclass(frozen=True, kw_only=True)
class RolloutMix:
    """Shares of a step's responses by author; the student writes the rest from its own prompt.

    Args:
        guided: Chance of each of the student's responses to be written under a privileged view
            of its prompt (EDGE-OPD, 2605.23493). The loss never sees that prompt.
        guided_view: The name of that view.
        teacher: Share of a step's prompts, exact to rounding, that the teacher's engine answers
            instead, once each (SG-OPD's phased teacher sampling, 2606.09304).
        recorded: Share of a step's prompts whose recorded response is taken instead.
        whole_steps: Toss one coin a step for `recorded` instead of splitting each step (GKD,
            2306.13649, where 1 - recorded is lambda).
        add_recorded: Besides what is sampled, take the recorded response of every prompt
            (Stable-OPD's gold solutions, 2604.08527).
        only_correct: Learn from the teacher's responses only where the verifier gives a full score.
    """

    guided: float = 0.0
    guided_view: str = "privileged"
    teacher: float = 0.0
    recorded: float = 0.0
    whole_steps: bool = False
    add_recorded: bool = False
    only_correct: bool = False

    def __post_init__(self) -> None:
        for name in ("guided", "teacher", "recorded"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise UserError(f"mix.{name}: got {share}, expected a share in [0, 1]")
        if self.only_correct and not self.teacher:
            raise UserError(
                "mix.only_correct: got true, but it is about the teacher's responses and "
                "mix.teacher is 0; leave it out"
            )
        if self.teacher + self.recorded > 1:
            raise UserError(
                f"mix: got teacher {self.teacher} + recorded {self.recorded}, expected at most 1; "
                "they are shares of the same prompts"
            )

    def check_moved(self, declared: RolloutMix, where: str) -> None:
        """Raise UserError if it needs what a run with the mix `declared` does not load.

        Args:
            declared: `data.mix`, for whose authors engines, views and prompts were prepared.
            where: Who moved it, and for which step, as the message names it.
        """
        for name in ("guided", "teacher", "recorded", "add_recorded"):
            if getattr(self, name) and not getattr(declared, name):
                raise UserError(
                    f"{where}: got mix.{name} {getattr(self, name)}, but data.mix.{name} is "
                    f"{getattr(declared, name)}, so nothing was prepared for it; set data.mix to "
                    "the largest shares of the run"
                )
        if self.samples and not declared.samples:
            raise UserError(
                f"{where}: got responses of the student, but data.mix leaves it no prompt, so its "
                "engine was not prepared; let data.mix.teacher and data.mix.recorded add up to "
                "less than 1"
            )
        if self.guided and self.guided_view != declared.guided_view:
            raise UserError(
                f"{where}: got mix.guided_view {self.guided_view!r}, expected "
                f"{declared.guided_view!r}, as in data.mix; leave it as it is"
            )

    @property
    def samples(self) -> bool:
        """Whether the student writes anything at any step."""
        return self.teacher < 1 and (self.recorded if self.whole_steps else self._given) < 1

    @property
    def _given(self) -> float:
        """Share of prompts that others than the student answer."""
        return self.teacher + self.recorded

    def counts(self, prompts: int) -> tuple[int, int]:
        """How many of a step's prompts go to the teacher and to the records, coin aside."""
        teacher = round(self.teacher * prompts)
        given = prompts if self._given == 1 else teacher + round(self.recorded * prompts)
        return teacher, given - teacher

    @property
    def reads_records(self) -> bool:
        return self.recorded > 0 or self.add_recorded

    def authors(self, seed: int, step: int, prompts: int, samples: int) -> list[list[Author]]:
        """Authors of every prompt's responses: `prompts` lists, by position in the step.

        A prompt has `samples` responses by the student, or one by somebody else.
        """
        first = step * prompts
        ranked = sorted(range(prompts), key=lambda p: derive_seed(AUTHOR, seed, step, first + p))
        teacher, given = self.counts(prompts)
        by_teacher = set(ranked[:teacher])
        if self.whole_steps:
            tossed = _share(derive_seed(AUTHOR, seed, step)) < self.recorded
            recorded = set(ranked) - by_teacher if tossed else set()
        else:
            recorded = set(ranked[teacher : teacher + given])
        result = []
        for p in range(prompts):
            if p in by_teacher:
                authors = [Author.TEACHER]
            elif p in recorded:
                authors = [Author.RECORDED]
            else:
                authors = [self._own(seed, step, first + p, s) for s in range(samples)]
            if self.add_recorded and p not in recorded:
                authors.append(Author.RECORDED)
            result.append(authors)
        return result

    def _own(self, seed: int, step: int, position: int, sample: int) -> Author:
        coin = _share(derive_seed(GUIDANCE, seed, step, position, sample))
        return Author.GUIDED if coin < self.guided else Author.STUDENT


@dataclass(frozen=True, kw_only=True)
class TeacherSampler:
    """A model that writes demonstrations.

    Args:
        path: Model folder or hub name; it must speak the student's token ids.
        engine: Who samples it: an engine of its own, whose weights never change.
        max_new_tokens: Budget of its responses; None takes the training sampling's.
    """

    path: str
    engine: Engine
    max_new_tokens: int | None = None


def samplings_by_author(
    sampling: Sampling, mix: RolloutMix, teacher: TeacherSampler | None
) -> dict[Author, Sampling]:
    """How each author draws. Where nothing is sampled the loss is the plain one: temperature 1."""
    own = sampling if mix.samples else Sampling()
    by_author = {Author.STUDENT: own, Author.GUIDED: own}
    if teacher is not None:
        budget = teacher.max_new_tokens or sampling.max_new_tokens
        by_author[Author.TEACHER] = replace(sampling, max_new_tokens=budget)
    return by_author


def _share(seed: int) -> float:
    """A 31-bit seed as a number in [0, 1)."""
    return seed / 2**31
