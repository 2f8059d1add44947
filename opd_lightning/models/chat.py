"""Chat templates: messages to token ids or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from opd_lightning.errors import UserError
from opd_lightning.types import Message, Prompt


def render(
    prompt: Prompt,
    tokenizer: Any,
    template_args: dict[str, Any],
    messages: Sequence[Message] | None = None,
    role: str = "student",
) -> list[int]:
    """Render a prompt's messages to token ids, up to the start of the reply.

    Args:
        prompt: Source of the messages; named in errors.
        tokenizer: A tokenizer with a chat template (rendered in transformers' Jinja sandbox).
        template_args: Extra template variables, e.g. {"enable_thinking": False}.
        messages: Messages to render instead of the prompt's.
        role: Model that the tokenizer belongs to; named in errors.
    """
    try:
        ids = tokenizer.apply_chat_template(
            list(messages or prompt.messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_args,
        )
    except TemplateError as error:
        raise UserError(
            f"{prompt.origin or prompt.id}: the {role}'s chat template refuses the messages: "
            f"{error}; change the row or the template"
        ) from error
    return list(ids)


def dropped_roles(
    prompt: Prompt, tokenizer: Any, template_args: dict[str, Any]
) -> list[tuple[int, str]]:
    """Return index and role of the messages whose content a chat template leaves out.

    Contents are replaced by words of their own, so the answer is one of roles and their order.
    """
    words = [f"content{i}of{len(prompt.messages)}" for i in range(len(prompt.messages))]
    probe: list[Message] = [
        {"role": message["role"], "content": word}
        for message, word in zip(prompt.messages, words, strict=True)
    ]
    text = render_text(probe, tokenizer, template_args)
    return [(i, probe[i]["role"]) for i, word in enumerate(words) if word not in text]


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    template_args: dict[str, Any],
    *,
    continues: bool = False,
) -> str:
    """Render messages to text, up to the reply, or with `continues` inside the last turn."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=False,
            **template_args,
        )
    except TemplateError as error:
        raise UserError(
            f"the student's chat template refuses the messages: {error}; leave out "
            "apply_chat_template, or change the template"
        ) from error
    return str(text)
