"""Checks of configuration, models and prompts that need no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.data.views import recorded_response_ids, render
from opd_lightning.errors import UserError
from opd_lightning.model_source import ModelSource
from opd_lightning.rollouts.base import Sampling
from opd_lightning.types import Prompt

if TYPE_CHECKING:
    from opd_lightning.methods.base import DistillationModule


def check_models(module: DistillationModule) -> None:
    """Student and teachers read, and the teachers speak the student's token ids."""
    student = module.student.source
    _check_usable(student)
    for teacher in module.teachers():
        _check_usable(teacher.source)
        _check_same_tokens(student, teacher.source)


def check_prompts(
    module: DistillationModule,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    *,
    recorded: bool,
) -> None:
    """Every prompt fits every model's context together with its response."""
    budget = sampling.max_new_tokens
    if recorded:
        tokenizer = module.student.source.tokenizer
        budget = max(len(recorded_response_ids(prompt, tokenizer)) for prompt in prompts)
    for source in (module.student.source, *(t.source for t in module.teachers())):
        _check_lengths(prompts, prompt_ids, budget, source.context_length, source.role)


def _check_usable(source: ModelSource) -> None:
    _ = source.config
    tokenizer = source.tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source.role} {source.path!r}: its tokenizer has no EOS token, so responses could "
            "never end; set eos_token in tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{source.role} {source.path!r}: its tokenizer has no chat template; add one "
            "(chat_template.jinja) or use the model's chat version"
        )


def _check_same_tokens(student: ModelSource, teacher: ModelSource) -> None:
    """Ids mean the same text to both, and a conversation ends alike."""
    pair = f"student {student.path!r} and teacher {teacher.path!r}"
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda item: item[1])[0]
        raise UserError(
            f"{pair} have different tokenizers: {len(ours)} and {len(theirs)} tokens, token "
            f"{token!r} is id {ours.get(token)} and {theirs.get(token)}; use models of one family"
        )
    if student.tokenizer.eos_token_id != teacher.tokenizer.eos_token_id:
        raise UserError(
            f"{pair} end their turns differently: EOS is {student.tokenizer.eos_token!r} and "
            f"{teacher.tokenizer.eos_token!r}, which makes responses run on; use the chat version "
            "of both or set eos_token alike"
        )
    probe = Prompt(id="probe", messages=({"role": "user", "content": "1"},))
    if render(probe, student.tokenizer, {}) != render(probe, teacher.tokenizer, {}):
        raise UserError(
            f"{pair} have different chat templates, so the teacher would score text it does not "
            "expect; give both the same chat_template"
        )


def _check_lengths(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    context: int,
    whose: str,
) -> None:
    """Refuse a prompt that leaves no room for `max_new_tokens` in a model's context."""
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"{prompt.origin}: prompt of {len(ids)} tokens + max_new_tokens {max_new_tokens} "
                f"exceeds the {whose}'s context of {context}; shorten the prompt or lower "
                "sampling.max_new_tokens"
            )
