"""Checks of every prompt and recorded response against the models that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.views import NO_FACTS, Renderer, ResponseFacts
from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts.base import Sampling
from opd_lightning.teachers.base import Ask, RecordedQuestion
from opd_lightning.types import Prompt

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule

# Facts whose own length is negligible.
_KNOWN = ResponseFacts(attempt="?", reward=1.0, peer="?", peer_failure="?", feedback="?")


class Budget(NamedTuple):
    """Most tokens of a response, for messages too."""

    tokens: int
    what: str = "max_new_tokens"
    setting: str = ""  # that lowers it


class Reading(NamedTuple):
    """A model that reads responses of up to a number of tokens under a view of the prompt."""

    source: ModelSource
    view: str
    budget: Budget


class PromptCheck:
    """Check that a prompt with its response fits the context of every model that reads both.

    The student reads all responses, a teacher those to prompts that it is responsible for, and an
    author of responses its own.

    Args:
        module: The method, with the student.
        renderer: Renderer of the prompts and views.
        sampling: Sampling of the student's responses.
        mix: Authors of the responses.
        sampler: Teacher that writes responses; None if there is none.
        asks: Teachers that score the responses, each under its view.
        max_tokens: Most positions of a micro-batch; None for any number.
    """

    def __init__(
        self,
        module: DistillationModule,
        renderer: Renderer,
        sampling: Sampling,
        mix: RolloutMix,
        sampler: TeacherSampler | None = None,
        *,
        asks: Iterable[Ask] = (),
        max_tokens: int | None = None,
    ) -> None:
        self.module = module
        self.renderer = renderer
        self.sampling = sampling
        self.mix = mix
        self.max_tokens = max_tokens
        self.asks = list(dict.fromkeys(asks))
        self.written: list[Reading] = []  # what the authors of responses read
        student = module.student.source
        if mix.samples:
            own = Budget(sampling.max_new_tokens, setting="sampling.max_new_tokens")
            views = ("student", *((mix.guided_view,) if mix.guided else ()))
            self.written += [Reading(student, view, own) for view in views]
        if sampler is not None and mix.teacher > 0:
            tokens = sampler.sampling_of(sampling).max_new_tokens
            theirs = Budget(tokens, setting="data.teacher's max_new_tokens")
            self.written.append(Reading(sampler.source, "student", theirs))

    def __call__(self, prompt: Prompt, ids: list[int]) -> None:
        """Raise `UserError` if the prompt, with these ids, does not fit."""
        for teacher in dict.fromkeys(ask.teacher for ask in self.asks):
            teacher.check_prompt(prompt)
        budgets = [reading.budget for reading in self.written]
        recorded: list[int] = []
        if self.mix.reads_records:
            recorded = self.renderer.recorded(prompt)
            budgets.append(Budget(len(recorded), "its response of"))
        longest = max(budgets)
        lengths = {"student": len(ids), **self._views(prompt, ids)}
        for source, view, budget in (*self._readings(prompt, longest), *self.written):
            if lengths[view] + budget.tokens > source.context_length:
                raise UserError(
                    f"{prompt.origin or prompt.id}: prompt of {lengths[view]} tokens + "
                    f"{budget.what} {budget.tokens} exceeds the {source.role}'s context of "
                    f"{source.context_length}; shorten the row"
                    + (f" or lower {budget.setting}" if budget.setting else "")
                )
        positions = sum(lengths.values()) + longest.tokens * len(lengths)
        if self.max_tokens is not None and positions > self.max_tokens:
            raise UserError(
                f"data.max_tokens_per_micro_batch: got {self.max_tokens}, but "
                f"{prompt.origin or prompt.id} with {longest.what} {longest.tokens} has "
                f"{positions} positions over all views; raise it, or shorten the row"
            )
        if recorded:
            _check_vocabulary(self.module, prompt, recorded)

    def _readings(self, prompt: Prompt, longest: Budget) -> Iterator[Reading]:
        """Yield what the models that score the responses read, teachers' foreign tokens aside."""
        student = self.module.student.source
        yield Reading(student, "student", longest)
        for ask in self.asks:
            part = ask.teacher.responsible(prompt)
            if not part.has_own_tokenizer:
                yield Reading(part.source or student, ask.view, longest)

    def _views(self, prompt: Prompt, ids: list[int]) -> dict[str, int]:
        """Return the most tokens of the prompt under every view."""
        lengths = {}
        for name, view in self.renderer.views.items():
            seen = self.renderer.view(name, prompt, _KNOWN if view.is_late else NO_FACTS) or []
            if seen == ids and not view.is_late and view.messages(prompt) != prompt.messages:
                raise UserError(
                    f"{prompt.origin or prompt.id}: the view {name!r} renders as the prompt alone: "
                    f"the chat template leaves out its {view.place} message; change its place in "
                    "data.views, or the template"
                )
            # A peer's response may have the maximum length; a token is about a character or more.
            length = min(self.sampling.max_new_tokens, view.late_characters or math.inf)
            lengths[name] = len(seen) + view.late_responses * int(length)
        return lengths


def check_teachers(
    module: DistillationModule,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    renderer: Renderer,
    temperature: float,
    mix: RolloutMix,
) -> None:
    """Check that every teacher can score all training prompts and recorded responses.

    Args:
        module: The method with its teachers.
        prompts: Prompts that have passed `PromptCheck`.
        prompt_ids: Their token ids.
        renderer: Renderer of the views.
        temperature: Temperature of the student's responses.
        mix: Authors of the responses.
    """
    for teacher in module.teachers():
        teacher.check(prompts, temperature)
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if mix.reads_records:
            recorded = renderer.recorded(prompt)
            _check_scorable(module, prompt, ids, recorded, renderer)


def _check_vocabulary(module: DistillationModule, prompt: Prompt, response_ids: list[int]) -> None:
    """Check that the response's token ids are in the student's vocabulary."""
    size = module.student.source.config.get_text_config().vocab_size
    if max(response_ids) >= size:
        raise UserError(
            f"{prompt.origin or prompt.id}: 'response_ids' holds token {max(response_ids)}, but "
            f"the student's vocabulary ends at {size - 1}; give ids of the student's own tokenizer"
        )


def _check_scorable(
    module: DistillationModule,
    prompt: Prompt,
    ids: list[int],
    response_ids: list[int],
    renderer: Renderer,
) -> None:
    """Check that every teacher can score the recorded response."""
    top_k = module.asked_top_k()
    for name, ask in module.all_asks().items():
        seen = ids if ask.view == "student" else renderer.view(ask.view, prompt)
        if seen is not None:
            question = RecordedQuestion(prompt, seen, response_ids, top_k[name])
            ask.teacher.responsible(prompt).check_question(question)
