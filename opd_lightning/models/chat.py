"""The chat template: messages to token ids, and to text."""

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
    """The chat template over a prompt's messages, ready for the reply, as ids.

    Args:
        prompt: Named in errors.
        tokenizer: A tokenizer with a chat template (rendered in transformers' Jinja sandbox).
        template_args: Extra variables for it, e.g. {"enable_thinking": False}.
        messages: In place of the prompt's own.
        role: Whose template it is; named in errors.
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


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    template_args: dict[str, Any],
    *,
    continues: bool = False,
) -> str:
    """The chat template over messages, as text: ready for the reply, or inside of the last turn."""
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
