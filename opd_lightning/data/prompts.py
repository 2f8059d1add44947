"""Prompt files: JSON lines, parquet or a saved dataset, read to a checked list of prompts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opd_lightning.data.rows import read_rows
from opd_lightning.errors import UserError
from opd_lightning.types import Message, Prompt

log = logging.getLogger(__name__)

TEXTS = ("answer", "response", "privileged", "domain", "id")
FIELDS = ("messages", *TEXTS, "response_ids")
NUMBERS_TOO = ("answer", "id")  # fields where 7 is as good as "7"
ROLES = ("system", "user", "assistant")


class BadRowError(ValueError):
    """Error in one row; `PromptSource` adds the file and the line."""


class PromptSource:
    """A file or folder of prompts.

    Args:
        path: A .jsonl or .parquet file, or a folder written by `datasets.Dataset.save_to_disk`.
        columns: Columns of the file by field, as field: column. The fields are messages (a chat,
            or text that becomes one user message), answer, response, privileged, domain, id and
            response_ids (the recorded response as token ids, EOS included, which is never
            tokenised again). A field that is not listed is read from the column of its name.
            Without a column messages, the column prompt is read.
        domains: Keep only the rows of these domains; None keeps all.
        limit: Keep only the first this many prompts.
        on_bad_row: Stop at a row that cannot be used ("error") or leave it out ("skip").

    `skipped` counts the rows that the last `load` left out.
    """

    def __init__(
        self,
        path: str,
        *,
        columns: dict[str, str] | None = None,
        domains: list[str] | None = None,
        limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        unknown = sorted(set(columns or {}) - set(FIELDS))
        if unknown:
            raise UserError(
                f"columns: unknown field {unknown[0]!r}; the fields are {', '.join(FIELDS)}, "
                "written as field: column"
            )
        if limit is not None and limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}; leave it out to read all rows")
        self.path = path
        self.columns = dict(columns or {})
        self.domains = domains
        self.limit = limit
        self.on_bad_row = on_bad_row
        self.skipped = 0

    def load(self, size: int | None = None) -> list[Prompt]:
        """Read every usable row, in the order of the file; JSON lines up to `size` bytes."""
        prompts: list[Prompt] = []
        problems: list[str] = []
        lines_by_id: dict[str, int] = {}
        unseen = dict(self.columns)
        domains: set[str] = set()
        for line, raw in read_rows(self.path, size):
            try:
                row = _decode(raw) if isinstance(raw, bytes) else raw
                unseen = {field: name for field, name in unseen.items() if name not in row}
                prompt = self._prompt(row, line)
                if prompt.id in lines_by_id:
                    earlier = lines_by_id[prompt.id]
                    raise BadRowError(f"'id' must be unique, got {prompt.id!r} as in row {earlier}")
            except BadRowError as error:
                problems.append(f"{self.path}:{line}: {error}")
                if self.on_bad_row == "error":
                    advice = "fix the row or set on_bad_row: skip"
                    raise UserError(f"{problems[-1]}; {advice}") from error
                continue
            lines_by_id[prompt.id] = line
            domains.add(prompt.domain)
            if self.domains is None or prompt.domain in self.domains:
                prompts.append(prompt)
            if len(prompts) == self.limit:
                break
        self.skipped = len(problems)
        if len(prompts) != self.limit:  # every row was read
            self._check_domains(domains)
        self._report(prompts, problems, unseen)
        return prompts

    def _check_domains(self, found: set[str]) -> None:
        for domain in self.domains or ():
            if domain not in found:
                raise UserError(
                    f"domains: no usable row of {self.path!r} is of {domain!r}, got "
                    f"{', '.join(sorted(found)) or 'none'}; correct the name or leave it out"
                )

    def _report(self, prompts: list[Prompt], problems: list[str], unseen: dict[str, str]) -> None:
        if not prompts:
            found = (
                f"all {len(problems)} rows are bad; first: {problems[0]}" if problems else "0 rows"
            )
            raise UserError(f"no usable prompt in {self.path!r}: {found}; give a file with prompts")
        for field, column in unseen.items():
            raise UserError(
                f"columns: no row read from {self.path!r} has a column {column!r} for {field!r}; "
                "correct the name or leave the field out"
            )
        if problems:
            rows = len(prompts) + len(problems)
            skipped = len(problems)
            log.warning(
                "skipped %d of %d rows of %s; first: %s", skipped, rows, self.path, problems[0]
            )

    def _prompt(self, row: Mapping[str, Any], line: int) -> Prompt:
        texts = {
            field: _text(row, self.columns.get(field, field), number=field in NUMBERS_TOO)
            for field in TEXTS
        }
        column = self.columns.get("messages", "messages")
        if "messages" not in self.columns and row.get("messages") is None and "prompt" in row:
            column = "prompt"
        return Prompt(
            id=texts["id"] or f"{Path(self.path).stem}:{line}",
            messages=_messages(row, column),
            answer=texts["answer"],
            response=texts["response"],
            response_ids=_ids(row, self.columns.get("response_ids", "response_ids")),
            privileged=texts["privileged"],
            domain=texts["domain"] or "default",
            origin=f"{self.path}:{line}",
        )


def _messages(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        got = _show(value) if column in row else f"only the columns {', '.join(map(str, row))}"
        raise BadRowError(f"{column!r} must be a chat or a text that is not empty, got {_cut(got)}")
    messages = tuple(_message(item, f"{column}[{i}]") for i, item in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise BadRowError(
            f"{column!r} must end before the assistant's turn, got an assistant message last (a "
            "recorded answer belongs in 'response')"
        )
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), str):
        raise BadRowError(f"'{where}' must have a role and a text as content, got {_show(item)}")
    if item.get("role") not in ROLES:
        roles = ", ".join(ROLES)
        raise BadRowError(f"'{where}' must have a role of {roles}, got {_show(item.get('role'))}")
    return {"role": item["role"], "content": _encodable(item["content"], where)}


def _text(row: Mapping[str, Any], column: str, *, number: bool) -> str | None:
    """Return the text in a column, or None; a number becomes text if `number`."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        return _encodable(value, column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and is_number and math.isfinite(value):
        return str(value)
    expected = "a text or a finite number" if number else "a text"
    raise BadRowError(f"{column!r} must be {expected}, got {_show(value)}")


def _ids(row: Mapping[str, Any], column: str) -> tuple[int, ...] | None:
    """Return the token ids in a column, or None."""
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column!r} must be a list of token ids, got {_show(value)}")
    for i, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise BadRowError(f"'{column}[{i}]' must be a token id, got {_show(token)}")
    return tuple(value)


def _encodable(text: str, where: str) -> str:
    # Half a surrogate pair is legal in JSON ("\ud83d") but no tokenizer takes it.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRowError(f"'{where}' must be valid Unicode, got half a surrogate pair")
    return text


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"must be UTF-8, got a bad byte at position {error.start}") from error
    except ValueError as error:
        raise BadRowError(
            f"must be one JSON object per line, got {_show(raw)} ({error})"
        ) from error
    if not isinstance(row, dict):
        raise BadRowError(f"must be one JSON object per line, got {_show(row)}")
    return row


def _show(value: Any) -> str:
    return "nothing" if value is None else _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
