"""Prompts as token ids: what a model reads before it writes or scores a response."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from opd_lightning.errors import UserError
from opd_lightning.types import Prompt


def render(prompt: Prompt, tokenizer: Any, template_args: dict[str, Any]) -> list[int]:
    """The plain view: the chat template over the prompt's messages, ready for the reply.

    Args:
        prompt: Its messages end with a user or system turn.
        tokenizer: A tokenizer with a chat template (rendered in transformers' Jinja sandbox).
        template_args: Extra template variables, e.g. {"enable_thinking": False}.
    """
    try:
        ids = tokenizer.apply_chat_template(
            list(prompt.messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_args,
        )
    except TemplateError as error:
        raise UserError(
            f"{prompt.origin or prompt.id}: the student's chat template refuses the messages: "
            f"{error}; change the row or the template"
        ) from error
    return list(ids)


def recorded_response_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The prompt's recorded response as the policy would have written it: text ids, then EOS."""
    if prompt.response is None:
        raise UserError(
            f"{prompt.origin}: no 'response' to learn from; add the column, or set data.engine "
            "so that responses are sampled"
        )
    ids = tokenizer.encode(prompt.response, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id]
