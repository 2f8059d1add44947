"""Chats in a row: messages with a role and a text, and the recorded response at their end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opd_lightning.data.layouts import has_column
from opd_lightning.data.rows import BadRowError, shown
from opd_lightning.errors import cut
from opd_lightning.types import Message

_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_CALLS = ("tool_calls", "function_call")  # keys of an assistant's message


class Chat(NamedTuple):
    """Messages up to the turn that the policy generates."""

    messages: tuple[Message, ...]
    response: str | None  # the assistant's turn at the end, if the row has one
    unread: frozenset[str]  # keys of messages with a value that no chat template is given


def read_chat(
    value: Any, column: str, row: Mapping[str, Any], *, system: str | None, history: Any, more: str
) -> Chat:
    """Read a chat, or a text that becomes one user message.

    Args:
        value: The text, or a list of messages with the keys role and content, or from and value.
        column: Where it is in the row; named in errors.
        row: The row.
        system: A system message in a column of its own; None or empty without one.
        history: Earlier turns as pairs of a user's and an assistant's text; None without any.
        more: Text that continues the user's, on a new line; empty without one.

    Raises:
        BadRowError: The chat cannot be read.
    """
    turns = _turns(history)
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": f"{value}\n{more}" if more.strip() else value}]
    elif turns or more.strip():
        field = "history" if turns else "input"
        raise BadRowError(f"{column!r} must be a text beside {field!r}, got {shown(value)}")
    if not isinstance(value, list) or not value:
        got = (
            shown(value)
            if has_column(row, column)
            else f"only the columns {', '.join(map(str, row))}"
        )
        raise BadRowError(f"{column!r} must be a chat or a text that is not empty, got {cut(got)}")
    read = [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]
    messages = [*turns, *(message for message, _ in read)]
    if system and system.strip():
        messages = _with_system(system, messages, column)
    response = None
    if messages[-1]["role"] == "assistant":
        response = messages.pop()["content"] or None
        if not any(message["role"] == "user" for message in messages):
            raise BadRowError(
                f"{column!r} must have a user's turn before the assistant's last, got none"
            )
    return Chat(tuple(messages), response, frozenset(key for _, keys in read for key in keys))


def encodable(text: str, where: str) -> str:
    """Return a text that tokenizers take. Raise `BadRowError` for half a surrogate pair."""
    # It is legal in JSON ("\ud83d").
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRowError(f"'{where}' must be valid Unicode, got half a surrogate pair")
    return text


def _message(item: Any, where: str) -> tuple[Message, set[str]]:
    """Return a message, and the keys of the item that are not read."""
    given = item if isinstance(item, Mapping) else {}
    calls = next((key for key in _CALLS if given.get(key)), None)
    tool = next((given[role] for role, _ in _KEYS if given.get(role) in _TOOL_ROLES), None)
    if calls or tool:
        what = f"calls a function ({calls})" if calls else f"is a turn of a tool (role {tool!r})"
        raise BadRowError(
            f"'{where}' {what}, which is not supported: expected turns of system, user, assistant "
            "with texts alone; leave out the row"
        )
    role, content = next(
        (keys for keys in _KEYS if isinstance(given.get(keys[1]), str)), ("role", "content")
    )
    if not isinstance(given.get(content), str):
        raise BadRowError(f"'{where}' must have a role and a text as content, got {shown(item)}")
    said = given.get(role)
    if not isinstance(said, str) or said not in _ROLES:
        raise BadRowError(
            f"'{where}' must have a role of system, user, assistant, got {shown(said)}"
        )
    unread = {key for key, value in given.items() if value is not None} - {role, content}
    return {"role": _ROLES[said], "content": encodable(given[content], where)}, unread


def _turns(history: Any) -> list[Message]:
    """Return earlier turns, given as pairs of texts, as messages."""
    if history is None:
        return []
    expected = "'history' must be a list of pairs of texts, a user's and an assistant's"
    if not isinstance(history, list):
        raise BadRowError(f"{expected}, got {shown(history)}")
    turns: list[Message] = []
    for i, pair in enumerate(history):
        where = f"history[{i}]"
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRowError(f"{expected}, got {shown(pair)} as '{where}'")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": encodable(text, where)})
    return turns


def _with_system(system: str, messages: list[Message], column: str) -> list[Message]:
    """Return the messages with a system message in front, unless they begin with the same."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise BadRowError(
            f"must have one system message, got {shown(system)} beside that in {column!r}; remove "
            "one of them"
        )
    return messages
