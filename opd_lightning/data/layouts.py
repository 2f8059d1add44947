"""Layouts of rows in public data sets, recognised by their columns, and columns by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opd_lightning.data.rows import BadRowError

# Fields of a row. `input` and `history` are read if they are listed or of a recognised layout.
FIELDS = (
    "messages",
    "system",
    "answer",
    "response",
    "privileged",
    "domain",
    "id",
    "response_ids",
    "input",
    "history",
)
_ONLY_LISTED = ("input", "history")
# Columns of a chat, or of a text that begins one, and what they are recognised as.
_CHATS = {
    "messages": "messages",
    "prompt": "messages",
    "conversations": "ShareGPT",
    "instruction": "Alpaca",
}
_OWN = ("messages", "prompt")  # which win over the others, as in any file with more columns
_COLUMNS = {
    "ShareGPT": {"messages": "conversations"},
    "Alpaca": {
        "messages": "instruction",
        "input": "input",
        "history": "history",
        "response": "output",
    },
    "verl": {"answer": "reward_model.ground_truth", "domain": "data_source"},
}


class Layout(NamedTuple):
    """Mapping from the columns of a row to the fields of a prompt.

    Attributes:
        name: "ShareGPT", "Alpaca" or "verl"; None for rows with the names of the fields.
        columns: Column, or path in nested columns, of each field. A field that is missing here
            has no column.
        recognised: The part of `columns` that the layout brings.
        unread: A further column with a chat, which is not read; None without one.
    """

    name: str | None
    columns: Mapping[str, str]
    recognised: Mapping[str, str]
    unread: str | None

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """Return the value of a field; None if the row has none."""
        column = self.columns.get(field)
        return None if column is None else value_at(row, column)


def layout_of(row: Mapping[str, Any], listed: Mapping[str, str]) -> Layout:
    """Recognise the layout of a row.

    A field is read from the column that is listed for it; else from the column of its name, if
    that has a value; else from the column of the layout. If `messages` is listed, no layout is
    recognised.

    Args:
        row: The row.
        listed: Columns by field, as the configuration lists them.

    Raises:
        BadRowError: The row has two chats, or two values of one field.
    """
    own = {field: field for field in FIELDS if field not in _ONLY_LISTED}
    if "messages" in listed:
        return Layout(None, own | dict(listed), {}, None)
    chats = [column for column in _CHATS if row.get(column) is not None]
    if len(chats) > 1 and chats[0] not in _OWN:
        raise _ambiguous(chats[0], chats[1], "messages")
    chat = chats[0] if chats else "prompt" if "prompt" in row else "messages"
    name = None if chat in _OWN else _CHATS[chat]
    if name is None and isinstance(row.get("reward_model"), Mapping):
        name = "verl"
    columns = own | {"messages": chat}
    recognised = {}
    for field, column in _COLUMNS.get(name or "", {}).items():
        if field in listed or not _is_there(row, column):
            continue
        if field in own and column != columns[field] and _is_there(row, field):
            # A domain is a label of the run's own; texts that models learn from must be one.
            if field != "domain" and str(value_at(row, column)) != str(row[field]):
                raise _ambiguous(field, column, field)
            continue
        recognised[field] = column
    unread = next((column for column in chats[1:] if row[column]), None)
    return Layout(name, columns | recognised | dict(listed), recognised, unread)


def has_column(row: Mapping[str, Any], path: str) -> bool:
    """Return whether a row has a column, or a key in nested columns, such as "a.b"."""
    return _at(row, path) is not _ABSENT


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column or of a key in nested columns; None if there is none."""
    value = _at(row, path)
    return None if value is _ABSENT else value


_ABSENT = object()


def _at(row: Mapping[str, Any], path: str) -> Any:
    if path in row:  # a name may have dots
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _is_there(row: Mapping[str, Any], column: str) -> bool:
    # Data sets with columns of texts have an empty one where there is none.
    return value_at(row, column) not in (None, "")


def _ambiguous(first: str, second: str, field: str) -> BadRowError:
    return BadRowError(
        f"must have one {field!r}, got the columns {first!r} and {second!r}; choose with columns: "
        f"{{{field}: ...}}"
    )
