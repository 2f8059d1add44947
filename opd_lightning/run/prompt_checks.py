"""Checks of every prompt and recorded response against the models that read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.views import NO_FACTS, Renderer, ResponseFacts
from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Sampling
from opd_lightning.run.configuration import teacher_sources
from opd_lightning.teachers.base import RecordedQuestion
from opd_lightning.types import Prompt

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule

# Facts whose own length is negligible.
_KNOWN = ResponseFacts(attempt="?", reward=1.0, peer="?", peer_failure="?", feedback="?")


class PromptCheck:
    """Check that a prompt with its response fits every model's context, in every view.

    Args:
        module: The method, with the student and its teachers. Teachers read training prompts only.
        renderer: Renderer of the prompts and views.
        sampling: Sampling of the responses.
        mix: Authors of the responses.
        sampler: Teacher that writes responses; None if there is none.
        training: Whether the prompts are trained on.
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
        training: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        sources = [module.student.source, *(teacher_sources(module) if training else [])]
        self.longest_response = sampling.max_new_tokens
        if sampler is not None:
            sources.append(sampler.source)
            theirs = sampler.sampling_of(sampling).max_new_tokens
            self.longest_response = max(self.longest_response, theirs)
        self.context, self.role = min((source.context_length, source.role) for source in sources)
        self.module = module
        self.renderer = renderer
        self.sampling = sampling
        self.mix = mix
        self.max_tokens = max_tokens
        self.teachers = module.teachers() if training else []

    def __call__(self, prompt: Prompt, ids: list[int]) -> None:
        """Raise `UserError` if the prompt, with these ids, does not fit."""
        for teacher in self.teachers:
            teacher.check_prompt(prompt)
        sampled = self.mix.samples or self.mix.teacher > 0
        budgets = {"max_new_tokens": self.longest_response} if sampled else {}
        recorded: list[int] = []
        if self.mix.reads_records:
            recorded = self.renderer.recorded(prompt)
            budgets["its response of"] = len(recorded)
        what, budget = max(budgets.items(), key=lambda item: item[1])
        longest = positions = len(ids)
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
            late = view.late_responses * int(length)
            longest = max(longest, len(seen) + late)
            positions += (len(seen) or len(ids)) + late
        if longest + budget > self.context:
            raise UserError(
                f"{prompt.origin or prompt.id}: prompt of {longest} tokens + {what} {budget} "
                f"exceeds the {self.role}'s context of {self.context}; shorten the row"
                + (" or lower sampling.max_new_tokens" if sampled else "")
            )
        positions += budget * (1 + len(self.renderer.views))
        if self.max_tokens is not None and positions > self.max_tokens:
            raise UserError(
                f"data.max_tokens_per_micro_batch: got {self.max_tokens}, but "
                f"{prompt.origin or prompt.id} with {what} {budget} has {positions} positions over "
                "all views; raise it, or shorten the row"
            )
        if recorded:
            _check_vocabulary(self.module, prompt, recorded)


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
