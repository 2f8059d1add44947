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
    from lightning.pytorch import Trainer

    from opd_lightning.methods.base import DistillationModule

# Weights and batches stay float32; others would convert log-probs and rewards with the inputs.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_models(module: DistillationModule) -> None:
    """Student and teachers read, and the teachers speak the student's token ids."""
    student = module.student.source
    check_usable(student)
    for teacher in module.teachers():
        check_usable(teacher.source)
        _check_same_tokens(student, teacher.source)
        sizes = [source.config.get_text_config().vocab_size for source in (student, teacher.source)]
        if module.compares_distributions and sizes[0] != sizes[1]:
            raise UserError(
                f"student {student.path!r} and teacher {teacher.source.path!r} have heads of "
                f"{sizes[0]} and {sizes[1]} tokens, which {type(module).__name__} cannot compare "
                "token by token; use opd_lightning.methods.OPD, which reads sampled tokens only"
            )


def check_prompts(
    module: DistillationModule,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    *,
    recorded: bool,
) -> None:
    """Every prompt fits every model's context together with its response."""
    tokenizer = module.student.source.tokenizer
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if recorded:
            budget, what = len(recorded_response_ids(prompt, tokenizer)), "its response of"
        else:
            budget, what = sampling.max_new_tokens, "max_new_tokens"
        for source in (module.student.source, *(t.source for t in module.teachers())):
            if len(ids) + budget > source.context_length:
                raise UserError(
                    f"{prompt.origin}: prompt of {len(ids)} tokens + {what} {budget} exceeds the "
                    f"{source.role}'s context of {source.context_length}; shorten the row"
                    + ("" if recorded else " or lower sampling.max_new_tokens")
                )


def check_trainer(trainer: Trainer) -> None:
    """Settings of Lightning's that would break a promise of ours."""
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision: got {trainer.precision!r}, expected one of "
            f"{', '.join(PRECISIONS)}; for weights in bfloat16 set student.dtype"
        )
    every, parts = trainer.val_check_interval, trainer.accumulate_grad_batches
    if isinstance(every, int) and every % parts:
        raise UserError(
            f"trainer.val_check_interval: got {every} micro-batches for "
            f"accumulate_grad_batches {parts}, expected a multiple, so that validation and "
            "checkpoints fall between optimiser steps"
        )


def check_usable(source: ModelSource) -> None:
    """A model can be read, and its tokenizer can hold a conversation."""
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
