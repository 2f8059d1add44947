"""Checks that models can be loaded, and that teachers share tokens and templates of the student."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.models.chat import render
from opd_lightning.models.source import ModelSource
from opd_lightning.models.tokenization import check_spelling
from opd_lightning.run.part_checks import check_held_teachers
from opd_lightning.types import Message, Prompt

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule

log = logging.getLogger(__name__)


def check_models(module: DistillationModule) -> None:
    """Check that models can be read and that teachers use the student's token ids."""
    student = module.student.source
    for teacher in module.teachers():
        check_held_teachers(teacher)
    check_usable(student)
    for source in teacher_sources(module):
        check_usable(source)
        check_same_tokens(student, source)
    for source in teacher_sources(module, foreign=True):
        check_usable(source)
        check_spelling(student)
        check_spelling(source)
    compared = [part for teacher in module.compared_teachers() for part in teacher.parts()]
    for part in (part for part in compared if not part.has_own_tokenizer):
        source = part.source or student
        sizes = [s.config.get_text_config().vocab_size for s in (student, source)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"student {student.path!r} and teacher {source.path!r} have heads of "
                f"{sizes[0]} and {sizes[1]} tokens, which {type(module).__name__} cannot compare "
                "token by token; use a method, rules and terms of sampled tokens only"
            )
    module.student.check()
    for part in module.teacher_parts():
        part.check_model(module.student)


def teacher_sources(module: DistillationModule, *, foreign: bool = False) -> list[ModelSource]:
    """Return sources of teachers with the student's tokenizer or, if `foreign`, with another."""
    parts = [part for part in module.teacher_parts() if part.has_own_tokenizer is foreign]
    return [part.source for part in parts if part.source is not None]


def context_of(module: DistillationModule) -> int:
    """Return the largest number of tokens that every model that reads a view can read."""
    student = module.student.source
    asks = [ask for ask in module.all_asks().values() if ask.view != "student"]
    parts = [part for ask in asks for part in ask.teacher.parts()]
    sources = [part.source or student for part in parts if not part.has_own_tokenizer]
    return min((source.context_length for source in sources), default=student.context_length)


def check_usable(source: ModelSource) -> None:
    """Check that a model can be loaded and its tokenizer has an EOS token and a chat template."""
    _ = source.context_length
    tokenizer = source.tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{source.role} {source.path!r}: its tokenizer has no EOS token, so responses could "
            "never end; set eos_token in tokenizer_config.json"
        )
    size = source.config.get_text_config().vocab_size
    if not any(0 <= i < size for i in source.eos_ids):
        raise UserError(
            f"{source.role} {source.path!r}: its EOS token is id {source.eos_ids[0]}, but its "
            f"vocabulary ends at {size - 1}, so responses could never end; set eos_token to one "
            "of the model's own"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{source.role} {source.path!r}: its tokenizer has no chat template; set "
            f"{source.role}.chat_template to a Jinja file, or use the model's chat version"
        )


def check_same_tokens(student: ModelSource, teacher: ModelSource, *, writes: bool = False) -> None:
    """Check that token ids, end tokens and prompts have the same meaning for teacher and student.

    Warns of differing response ends and default system messages.

    Args:
        student: The student.
        teacher: The teacher.
        writes: Whether the teacher writes responses, which may contain any of its tokens.
    """
    pair = f"student {student.path!r} and teacher {teacher.path!r}"
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    # Responses contain tokens of the teacher alone only if it writes them.
    differing = ours.items() ^ theirs.items() if writes else ours.items() - theirs.items()
    if differing:
        token = min(differing, key=lambda item: item[1])[0]
        raise UserError(
            f"{pair} have different tokenizers: {len(ours)} and {len(theirs)} tokens, token "
            f"{token!r} is id {ours.get(token)} and {theirs.get(token)}; use models of one family, "
            "or CrossTokenizerTeacher"
        )
    _check_ends(student, teacher, pair)
    _check_templates(student, teacher, pair)


def _check_ends(student: ModelSource, teacher: ModelSource, pair: str) -> None:
    """Check that the student's responses end where the teacher ends a turn."""
    end, theirs = student.tokenizer.eos_token, teacher.tokenizer.eos_token
    chosen = student.eos_tokens is not None or teacher.eos_tokens is not None
    if teacher.tokenizer.eos_token_id not in student.eos_ids and not chosen:
        raise UserError(
            f"{pair} end their turns differently: EOS is {end!r} and {theirs!r}, which makes "
            f"responses run on; set model.student.eos_tokens to [{theirs!r}], or use the chat "
            "version of both"
        )
    unmatched = [i for i in student.eos_ids if i not in teacher.eos_ids]
    if unmatched:
        names = ", ".join(map(repr, student.tokenizer.convert_ids_to_tokens(unmatched)))
        log.warning(
            "%d of the %d tokens that end the student's responses (%s) do not end those of the "
            "teacher %r, which scores them as text; set eos_tokens of both alike",
            len(unmatched),
            len(student.eos_ids),
            names,
            teacher.path,
        )


def _check_templates(student: ModelSource, teacher: ModelSource, pair: str) -> None:
    """Check that both chat templates render alike where the system message is given."""
    question: Message = {"role": "user", "content": "1"}
    bare = Prompt(id="probe", messages=(question,))
    full = Prompt(id="probe", messages=({"role": "system", "content": "2"}, question))

    def rendered(prompt: Prompt) -> list[list[int]]:
        return [render(prompt, source.tokenizer, {}, role=source.role) for source in both]

    both = (student, teacher)
    mine, its = rendered(bare)
    if mine == its:
        return
    try:
        given = rendered(full)
    except UserError:  # a template without system messages
        given = [mine, its]
    if given[0] != given[1]:
        raise UserError(
            f"{pair} have different chat templates, so the teacher would score text it does not "
            "expect; set chat_template of one, in model.student or its teacher, to the other's"
        )
    log.warning(
        "%s add different system messages to prompts that have none, of %d and %d tokens with the "
        "question; both read the student's. Set chat_template of one to choose, or give every "
        "prompt a system message",
        pair,
        len(mine),
        len(its),
    )
