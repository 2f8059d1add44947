"""Chat templates: messages to token ids or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from opd_lightning.errors import UserError, reason_of
from opd_lightning.models.bounded import bounded
from opd_lightning.types import Message, Prompt

# Limit of a conversation: more than four million tokens, which take about `TIME_LIMIT` to encode.
MAX_CHARACTERS = 2**24
_BATCH = 256  # conversations encoded in one call

# Where a text ends: at the start of the reply, after the last message, or inside of it.
End = Literal["reply", "message", "open"]

# Arguments of `apply_chat_template` that are about the token ids and not about the text.
_ENCODING = {"max_length", "padding", "return_tensors", "tokenizer_kwargs", "truncation"}


class ChatTemplateError(ValueError):
    """A chat template refuses a conversation, or takes more time, memory or text than allowed."""


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

    Raises:
        UserError: The template refuses the messages, or exceeds a limit.
    """
    try:
        return template_ids(messages or prompt.messages, tokenizer, template_args)
    except ChatTemplateError as error:
        raise UserError(
            f"{prompt.origin or prompt.id}: the {role}'s chat template refuses the messages: "
            f"{error}; change the row or the template"
        ) from error


def render_all(
    chats: Sequence[Sequence[Message]], tokenizer: Any, template_args: dict[str, Any]
) -> list[list[int] | None]:
    """Render many chats to token ids, each up to the start of its reply.

    `_BATCH` of them are encoded in one call, which takes a fraction of the time of `render` for
    each.

    Args:
        chats: Messages of every chat.
        tokenizer: A tokenizer with a chat template.
        template_args: Extra template variables.

    Returns:
        Token ids of every chat; None for those of a call that failed, of which `render` says why.
    """
    found: list[list[int] | None] = []
    for start in range(0, len(chats), _BATCH):
        batch = chats[start : start + _BATCH]
        found += _render_batch(batch, tokenizer, template_args) or [None] * len(batch)
    return found


def _render_batch(
    chats: Sequence[Sequence[Message]], tokenizer: Any, template_args: dict[str, Any]
) -> list[list[int]] | None:
    try:
        if not _encodes_text(tokenizer, template_args):
            return [template_ids(messages, tokenizer, template_args) for messages in chats]
        texts = [template_text(messages, tokenizer, template_args) for messages in chats]
        return _encode(texts, tokenizer)
    except ChatTemplateError:
        return None


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
    messages: Sequence[Message], tokenizer: Any, template_args: dict[str, Any], end: End = "reply"
) -> str:
    """Render messages to text.

    Raises:
        UserError: The template refuses the messages, or exceeds a limit.
    """
    try:
        return template_text(messages, tokenizer, template_args, end)
    except ChatTemplateError as error:
        raise UserError(
            f"the student's chat template refuses the messages: {error}; leave out "
            "apply_chat_template, or change the template"
        ) from error


def template_text(
    messages: Sequence[Message], tokenizer: Any, template_args: dict[str, Any], end: End = "reply"
) -> str:
    """Apply a tokenizer's chat template without encoding the text.

    Raises:
        ChatTemplateError: The template raises, or exceeds a limit.
    """
    try:
        text = bounded(lambda: _apply(messages, tokenizer, template_args, end, tokenize=False))
    except Exception as error:  # whatever the template's expressions raise
        raise ChatTemplateError(why_not_rendered(error)) from error
    if len(text) > MAX_CHARACTERS:
        raise ChatTemplateError(
            f"it makes a text of {len(text)} characters of them, expected at most {MAX_CHARACTERS}"
        )
    return str(text)


def template_ids(
    messages: Sequence[Message], tokenizer: Any, template_args: dict[str, Any], end: End = "reply"
) -> list[int]:
    """Apply a tokenizer's chat template and encode the text.

    Raises:
        ChatTemplateError: The template raises, or exceeds a limit.
    """
    if _encodes_text(tokenizer, template_args):
        return _encode([template_text(messages, tokenizer, template_args, end)], tokenizer)[0]
    template_text(messages, tokenizer, template_args, end)  # within its limits
    try:
        ids = bounded(lambda: _apply(messages, tokenizer, template_args, end, tokenize=True))
    except Exception as error:
        raise ChatTemplateError(why_not_rendered(error)) from error
    return list(ids)


def _encodes_text(tokenizer: Any, template_args: dict[str, Any]) -> bool:
    """Return whether encoding the text of a template gives the ids of `apply_chat_template`."""
    from transformers import PreTrainedTokenizerBase

    own_way = getattr(type(tokenizer), "apply_chat_template", None)
    return own_way is PreTrainedTokenizerBase.apply_chat_template and not (
        _ENCODING & template_args.keys()
    )


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    try:
        # Tokenizers abort the process when memory ends.
        encoded = bounded(lambda: tokenizer(texts, add_special_tokens=False), memory=False)
    except Exception as error:
        raise ChatTemplateError(why_not_rendered(error)) from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _apply(
    messages: Sequence[Message],
    tokenizer: Any,
    template_args: dict[str, Any],
    end: End,
    *,
    tokenize: bool,
) -> Any:
    return tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=end == "reply",
        continue_final_message=end == "open",
        tokenize=tokenize,
        return_dict=False,
        **template_args,
    )


def why_not_rendered(error: Exception) -> str:
    """Return the message of a template's error, with its class where that says more."""
    import jinja2

    known = isinstance(error, jinja2.TemplateError | TimeoutError | MemoryError)
    return reason_of(error) if known else f"{type(error).__name__}: {reason_of(error)}"
