"""Checks of every prompt and recorded response against the models that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.data.mix import RolloutMix, TeacherSampler, samplings_by_author
from opd_lightning.data.views import Renderer, recorded_response_ids
from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts.base import Sampling
from opd_lightning.run.configuration import teacher_sources
from opd_lightning.teachers.base import RecordedQuestion
from opd_lightning.types import Author, Prompt

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule


def check_prompts(
    module: DistillationModule,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    renderer: Renderer,
    sampling: Sampling,
    mix: RolloutMix,
    sampler: TeacherSampler | None = None,
    *,
    training: bool = True,
) -> None:
    """Check that every prompt with its response fits every model's context, in every view.

    Teachers read training prompts only; each also checks the recorded responses.
    """
    teachers = module.teachers() if training else []
    sources = [module.student.source, *(teacher_sources(module) if training else [])]
    longest_response = sampling.max_new_tokens
    if sampler is not None:
        sources.append(ModelSource(sampler.path, role="data.teacher"))
        longest_response = max(longest_response, sampler.max_new_tokens or 0)
    context, role = min((source.context_length, source.role) for source in sources)
    temperature = samplings_by_author(sampling, mix, sampler)[Author.STUDENT].temperature
    for teacher in teachers:
        teacher.check(prompts, temperature)
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        sampled = mix.samples or mix.teacher > 0
        budgets = {"max_new_tokens": longest_response} if sampled else {}
        recorded: list[int] = []
        if mix.reads_records:
            recorded = recorded_response_ids(prompt, renderer.tokenizer)
            budgets["its response of"] = len(recorded)
        what, budget = max(budgets.items(), key=lambda item: item[1])
        longest = len(ids)
        for name, view in renderer.views.items():
            # A peer's response may have the maximum length.
            peer = "?" if view.is_late else None
            seen = renderer.view(name, prompt, peer, peer) or []
            longest = max(longest, len(seen) + (sampling.max_new_tokens if view.is_late else 0))
        if longest + budget > context:
            raise UserError(
                f"{prompt.origin or prompt.id}: prompt of {longest} tokens + {what} {budget} "
                f"exceeds the {role}'s context of {context}; shorten the row"
                + (" or lower sampling.max_new_tokens" if sampled else "")
            )
        if recorded:
            _check_vocabulary(module, prompt, recorded)
            if training:
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
