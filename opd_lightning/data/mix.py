"""Assignment of authors to a step's responses, a function of (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.seeding import AUTHOR, GUIDANCE, derive_seed
from opd_lightning.types import Author


@dataclass(frozen=True, kw_only=True)
class RolloutMix:
    """Shares of a step's responses by author; the student writes the rest from its own prompt.

    Args:
        guided: Probability that a response of the student is written under a privileged view
            of its prompt (EDGE-OPD, 2605.23493). The loss never sees that prompt.
        guided_view: Name of that view.
        teacher: Share of a step's prompts, exact to rounding, that the teacher's engine answers
            instead, `data.teacher.samples` times each (SG-OPD's phased teacher sampling,
            2606.09304).
        recorded: Share of a step's prompts whose recorded response is used instead.
        whole_steps: Draw once a step for `recorded` instead of splitting each step (GKD,
            2306.13649, where 1 - recorded is lambda).
        add_recorded: Also use the recorded response of every prompt, besides the sampled ones
            (Stable-OPD's gold solutions, 2604.08527).
        only_correct: Train on the teacher's responses only where the verifier gives a full score.
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
            declared: `data.mix`; engines, views and prompts were prepared for its authors.
            where: Callback and step that changed it, for the message.
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
        """Return whether the student writes any response at any step."""
        return self.teacher < 1 and (self.recorded if self.whole_steps else self._given) < 1

    @property
    def _given(self) -> float:
        """Share of prompts with a response from the teacher or the prompt file instead."""
        return self.teacher + self.recorded

    def counts(self, prompts: int) -> tuple[int, int]:
        """Return the numbers of a step's prompts for the teacher and the records, without draws."""
        teacher = round(self.teacher * prompts)
        given = prompts if self._given == 1 else teacher + round(self.recorded * prompts)
        return teacher, given - teacher

    @property
    def reads_records(self) -> bool:
        return self.recorded > 0 or self.add_recorded

    def authors(
        self, seed: int, step: int, prompts: int, samples: int, teacher_samples: int = 1
    ) -> list[list[Author]]:
        """Draw the authors of every prompt's responses: `prompts` lists, by position in the step.

        A prompt has `samples` responses by the student, `teacher_samples` by the teacher, or a
        recorded one.
        """
        first = step * prompts
        ranked = sorted(range(prompts), key=lambda p: derive_seed(AUTHOR, seed, step, first + p))
        teacher, given = self.counts(prompts)
        by_teacher = set(ranked[:teacher])
        if self.whole_steps:
            drawn = _fraction(derive_seed(AUTHOR, seed, step)) < self.recorded
            recorded = set(ranked) - by_teacher if drawn else set()
        else:
            recorded = set(ranked[teacher : teacher + given])
        result = []
        for p in range(prompts):
            if p in by_teacher:
                authors = [Author.TEACHER] * teacher_samples
            elif p in recorded:
                authors = [Author.RECORDED]
            else:
                authors = [self._student(seed, step, first + p, s) for s in range(samples)]
            if self.add_recorded and p not in recorded:
                authors.append(Author.RECORDED)
            result.append(authors)
        return result

    def _student(self, seed: int, step: int, position: int, sample: int) -> Author:
        draw = _fraction(derive_seed(GUIDANCE, seed, step, position, sample))
        return Author.GUIDED if draw < self.guided else Author.STUDENT


@dataclass(frozen=True, kw_only=True)
class TeacherSampler:
    """A model that writes demonstrations.

    Args:
        path: Model folder or hub name; it must use the student's token ids.
        engine: Samples its responses: a separate engine, whose weights never change.
        max_new_tokens: Longest response, in tokens; None uses the training sampling's.
        sampling: Sampling of its responses, greedy and truncated allowed; None uses the training
            sampling.
        chat_template: Jinja text or file that it is taken to expect, instead of the folder's.
            Prompts are always rendered with the student's.
        eos_tokens: Tokens that end its responses, instead of the folder's.
        samples: Responses to each of its prompts.
        keep: Of several: "all", or the "best", which has the highest reward and, among equals, the
            highest mean log-prob under the student (BRTS, 2605.09725).
    """

    path: str
    engine: Engine
    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    chat_template: str | None = None
    eos_tokens: list[str] | None = None
    samples: int = 1
    keep: Literal["all", "best"] = "all"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"data.teacher.samples: got {self.samples}, expected at least 1")
        if self.keep == "best" and self.samples == 1:
            raise UserError(
                "data.teacher.keep: got 'best', but data.teacher.samples is 1; raise it, or leave "
                "keep out"
            )
        if self.sampling is not None and self.max_new_tokens is not None:
            raise UserError(
                f"data.teacher.max_new_tokens: got {self.max_new_tokens} besides "
                "data.teacher.sampling, which has its own; leave one of them out"
            )

    def sampling_of(self, training: Sampling) -> Sampling:
        """Return the sampling of its responses in a run with the sampling `training`."""
        budget = self.max_new_tokens or training.max_new_tokens
        return self.sampling or replace(training, max_new_tokens=budget)

    @cached_property
    def source(self) -> ModelSource:
        """The model's folder, with its tokenizer and stop tokens."""
        return ModelSource(
            self.path,
            role="data.teacher",
            chat_template=self.chat_template,
            eos_tokens=self.eos_tokens,
        )


def samplings_by_author(
    sampling: Sampling, mix: RolloutMix, teacher: TeacherSampler | None
) -> dict[Author, Sampling]:
    """Return each author's sampling; without sampled responses the loss uses temperature 1."""
    own = sampling if mix.samples else Sampling()
    by_author = {Author.STUDENT: own, Author.GUIDED: own}
    if teacher is not None:
        by_author[Author.TEACHER] = teacher.sampling_of(sampling)
    return by_author


def _fraction(seed: int) -> float:
    """Map a 31-bit seed to [0, 1)."""
    return seed / 2**31
