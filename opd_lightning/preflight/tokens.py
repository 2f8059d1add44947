"""Checks of tokens and templates, which need tokenizers and prompts, but no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opd_lightning.models.chat import ChatTemplateError, render, template_ids, template_text
from opd_lightning.models.source import ModelSource
from opd_lightning.preflight.finding import Finding
from opd_lightning.run.model_checks import teacher_sources
from opd_lightning.types import Message, Prompt

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

REPLY = "1"  # any tokenizer can encode it
PROBE = Prompt(id="probe", messages=({"role": "user", "content": "1"},))


def check_tokens(
    module: DistillationModule, data: RolloutDataModule, prompts: Sequence[Prompt] = ()
) -> Iterator[Finding]:
    """Check vocabularies, end tokens and chat templates; `prompts` are the run's, if readable."""
    student = module.student.source
    others = teacher_sources(module)
    if data.teacher is not None:
        others.append(data.teacher.source)
    unique = {source.path: source for source in others if source.path != student.path}
    ours = student.tokenizer.get_vocab()
    others = [s for s in unique.values() if s.tokenizer.get_vocab() == ours]
    prompt = next((p for p in prompts if p.messages[-1]["role"] == "user"), PROBE)
    yield _vocabulary(student)
    yield from (_padding(student, other) for other in others if _head(other) != _head(student))
    yield _ends(student, others)
    yield _template(student, prompt, data)
    yield from _same_prompts(student, others, prompt, data.template_args)


def _head(source: ModelSource) -> int:
    return int(source.config.get_text_config().vocab_size)


def _vocabulary(student: ModelSource) -> Finding:
    known, rows = max(student.tokenizer.get_vocab().values()) + 1, _head(student)
    if known > rows:
        return Finding(
            "error",
            "vocabulary",
            f"the student's tokenizer knows {known:,} ids, its head has {rows:,} rows",
            "some prompts hold ids that the model has no embedding for",
            "take the tokenizer that belongs to the model",
        )
    padding = f", of which {rows - known:,} are padding" if rows > known else ""
    return Finding("ok", "vocabulary", f"{known:,} tokens, a head of {rows:,} rows{padding}")


def _padding(student: ModelSource, other: ModelSource) -> Finding:
    return Finding(
        "info",
        "vocabulary padding",
        f"the student's head has {_head(student):,} rows, the {other.role}'s {_head(other):,}, "
        "for the same tokens",
        "the rest is padding that training pushed to no weight: log-probs of tokens agree, whole "
        "distributions cannot be compared (a method that does is refused)",
    )


def _ends(student: ModelSource, others: Sequence[ModelSource]) -> Finding:
    ours = _named(student, student.eos_ids)
    for other in others:
        if other.eos_ids != student.eos_ids:
            return Finding(
                "warning",
                "end of a response",
                f"the student ends at {ours}, the {other.role} at {_named(other, other.eos_ids)}",
                "where only one of them ends, the other's opinion of that token is about "
                "something else",
                "give both the same eos_token_id in generation_config.json",
            )
    return Finding("ok", "end of a response", f"at {ours}")


def _named(source: ModelSource, ids: Sequence[int]) -> str:
    names = source.tokenizer.convert_ids_to_tokens(list(ids))
    return " or ".join(f"{name} ({i})" for name, i in zip(names, ids, strict=True))


def _template(student: ModelSource, prompt: Prompt, data: RolloutDataModule) -> Finding:
    """Check that the template of a conversation continues the rendered prompt."""
    reply: Message = {"role": "assistant", "content": REPLY}
    conversation = (*prompt.messages, reply)
    try:
        asked = template_text(prompt.messages, student.tokenizer, data.template_args)
        whole = template_text(conversation, student.tokenizer, data.template_args, "message")
        ids = template_ids(conversation, student.tokenizer, data.template_args, "message")
    except ChatTemplateError as error:
        return Finding("warning", "chat template", f"it refuses a whole conversation: {error}")
    if not whole.startswith(asked):
        at = next(i for i, c in enumerate(asked) if whole[i : i + 1] != c)
        return Finding(
            "warning",
            "chat template",
            f"the prompt ends in {asked[at:][-40:]!r} where the whole conversation has "
            f"{whole[at : at + 40]!r}",
            "the student is asked for replies in a place where conversations that it was trained "
            "on, and that users hold, have none",
            "set data.template_args, or the template's part under add_generation_prompt",
        )
    before, _, after = whole[len(asked) :].partition(REPLY)
    if before:
        return Finding(
            "warning" if data.mix.reads_records else "info",
            "chat template",
            f"it writes {before!r} before a reply, which the prompt does not end in",
            "sampled replies begin with whatever the student writes there; recorded ones begin "
            "with their text",
            f"begin recorded responses with {before!r}, or set data.template_args"
            if data.mix.reads_records
            else "",
        )
    closing = student.tokenizer.encode(after, add_special_tokens=False)[:1]
    if not set(closing) & set(student.eos_ids):
        end = _named(student, closing) if closing else "nothing"
        return Finding(
            "warning",
            "chat template",
            f"it closes a reply with {end}, which ends no response; "
            f"{_named(student, student.eos_ids)} does",
            "the student writes on after its turn, and its budget is spent on rubbish",
            "add that token to eos_token_id in the student's generation_config.json",
        )
    prompt_ids = render(prompt, student.tokenizer, data.template_args)
    if ids[: len(prompt_ids)] != prompt_ids:
        return Finding(
            "warning",
            "chat template",
            f"the prompt's last token {student.tokenizer.convert_ids_to_tokens(prompt_ids[-1])!r} "
            "is another one where a reply follows",
            "tokens reach across the border, so the student is asked in a way that it never read",
            "end the prompt of the template in a special token or a line break, not in a space",
        )
    return Finding("ok", "chat template", "a reply continues the prompt and ends alike")


def _same_prompts(
    student: ModelSource,
    others: Sequence[ModelSource],
    prompt: Prompt,
    template_args: dict[str, Any],
) -> list[Finding]:
    ours = render(prompt, student.tokenizer, template_args)
    return [
        Finding(
            "warning",
            "chat template",
            f"the {other.role}'s own template renders {prompt.origin or 'a question'} otherwise",
            "it reads the student's prompt, a form that it was not trained on",
            "give both the same chat_template and data.template_args that both know",
        )
        for other in others
        if render(prompt, other.tokenizer, template_args) != ours
    ]
