"""Prompt files: JSON lines, parquet or a saved dataset, read to a checked list of prompts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opd_lightning import strict_json
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.row_report import Problems, Texts
from opd_lightning.data.rows import BadRowError, read_rows
from opd_lightning.errors import UserError
from opd_lightning.types import Message, Prompt

log = logging.getLogger(__name__)

BATCH = 256  # rows that are read and tokenised together
TEXTS = ("answer", "response", "privileged", "domain", "id")
FIELDS = ("messages", *TEXTS, "response_ids")
NUMBERS_TOO = ("answer", "id")  # fields where 7 is as good as "7"
ROLES = ("system", "user", "assistant")


class _Used(NamedTuple):
    """A row that is of use if it passes the checks."""

    prompt: Prompt
    row: Mapping[str, Any]


class _Seen:
    """What was seen in the rows so far."""

    def __init__(self, columns: dict[str, str]) -> None:
        self.lacking = columns  # those that no row had, by field
        self.lines: dict[str, int] = {}  # by id of the prompt
        self.domains: set[str] = set()


class PromptSource:
    """A file or folder of prompts.

    Args:
        path: A .jsonl or .parquet file, or a folder written by `datasets.Dataset.save_to_disk`;
            `~` is the home folder.
        columns: Columns of the file by field, as field: column. The fields are messages (a chat,
            or text that becomes one user message), answer, response, privileged, domain, id and
            response_ids (the recorded response as token ids, EOS included, which is never
            tokenised again). A field that is not listed is read from the column of its name.
            Without a column messages, the column prompt is read.
        domains: Keep only the rows of these domains; None keeps all.
        limit: Keep only the first this many prompts.
        on_bad_row: Stop at a row that cannot be used ("error") or leave it out ("skip"),
            whatever the reason: it cannot be read, the verifier misses its answer, the chat
            template refuses it, or it is too long for a model.
        on_control_tokens: What to do with a text that holds a control token, such as <|im_end|>,
            which the tokenizer would read as that token: "warn" and use it, make it an "error" of
            the row, or "escape" it with a space after its first character.

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
        on_control_tokens: Literal["warn", "error", "escape"] = "warn",
    ) -> None:
        unknown = sorted(set(columns or {}) - set(FIELDS))
        if unknown:
            raise UserError(
                f"columns: unknown field {unknown[0]!r}; the fields are {', '.join(FIELDS)}, "
                "written as field: column"
            )
        if limit is not None and limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}; leave it out to read all rows")
        self.path = os.path.expanduser(path)
        self.columns = dict(columns or {})
        self.domains = domains
        self.limit = limit
        self.on_bad_row = on_bad_row
        self.on_control_tokens = on_control_tokens
        self.skipped = 0

    def load(self, size: int | None = None, checks: RowChecks | None = None) -> list[Prompt]:
        """Read every usable row, in the order of the file.

        Args:
            size: Read JSON lines up to this many bytes; None reads all.
            checks: What a row has to pass besides; None uses every row that can be read.

        Raises:
            UserError: The file cannot be read, a row cannot be used (unless such rows are
                skipped), or no row can.
        """
        prompts: list[Prompt] = []
        problems = Problems()
        seen = _Seen(dict(self.columns))
        texts = Texts(self.path, checks)
        rows = read_rows(self.path, size)
        # In batches, as prompts are tokenised faster together, and none is read beyond the limit.
        while room := BATCH if self.limit is None else min(BATCH, self.limit - len(prompts)):
            batch = [self._read(line, raw, seen, checks) for line, raw in islice(rows, room)]
            if not batch:  # every row was read
                self._check_domains(seen.domains)
                break
            used = [one for one in batch if isinstance(one, _Used)]
            if checks is not None:
                checks.prepare([one.prompt for one in used])
            for one in batch:
                if isinstance(one, BadRowError):
                    problems.add("cannot be read", str(one))
                    if self.on_bad_row == "error":
                        advice = "fix the row or set on_bad_row: skip"
                        raise UserError(f"{problems.first}; {advice}") from one
                elif one is not None and self._passes(one.prompt, checks, problems):
                    prompts.append(one.prompt)
                    texts.see(one.prompt, one.row, self.columns)
        self.skipped = problems.count
        self._report(prompts, problems, seen.lacking)
        texts.report(len(prompts))
        return prompts

    def _read(
        self, line: int, raw: Any, seen: _Seen, checks: RowChecks | None
    ) -> _Used | BadRowError | None:
        """Return a row as a prompt, or why it is none; None if it is of a domain not asked for."""
        try:
            if isinstance(raw, BadRowError):
                raise raw
            row = _decode(raw) if isinstance(raw, bytes) else raw
            seen.lacking = {field: name for field, name in seen.lacking.items() if name not in row}
            prompt = self._prompt(row, line)
            if prompt.id in seen.lines:
                earlier = seen.lines[prompt.id]
                raise BadRowError(f"'id' must be unique, got {prompt.id!r} as in row {earlier}")
            prompt = self._without_control_tokens(prompt, checks)
        except BadRowError as error:
            return BadRowError(f"{self.path}:{line}: {error}")
        seen.lines[prompt.id] = line
        seen.domains.add(prompt.domain)
        wanted = self.domains is None or prompt.domain in self.domains
        return _Used(prompt, row) if wanted else None

    def _passes(self, prompt: Prompt, checks: RowChecks | None, problems: Problems) -> bool:
        """Return whether a prompt passes all checks; raise the error unless rows are skipped."""
        for reason, check in checks.steps() if checks else ():
            try:
                check(prompt)
            except UserError as error:
                if self.on_bad_row == "error":
                    raise
                problems.add(reason, str(error))
                return False
        return True

    def _without_control_tokens(self, prompt: Prompt, checks: RowChecks | None) -> Prompt:
        """Return the prompt with control tokens escaped, where they are neither used nor errors."""
        if self.on_control_tokens == "warn" or checks is None:
            return prompt
        if (token := checks.control_token(prompt)) is None:
            return prompt
        if self.on_control_tokens == "error":
            raise BadRowError(f"must not hold control tokens as text, got {_cut(repr(token))}")
        escaped: tuple[Message, ...] = tuple(
            {"role": message["role"], "content": checks.escaped(message["content"])}
            for message in prompt.messages
        )
        return replace(
            prompt,
            messages=escaped,
            response=prompt.response and checks.escaped(prompt.response),
            privileged=prompt.privileged and checks.escaped(prompt.privileged),
        )

    def _check_domains(self, found: set[str]) -> None:
        for domain in self.domains or ():
            if domain not in found:
                raise UserError(
                    f"domains: no usable row of {self.path!r} is of {domain!r}, got "
                    f"{', '.join(sorted(found)) or 'none'}; correct the name or leave it out"
                )

    def _report(self, prompts: list[Prompt], problems: Problems, unseen: dict[str, str]) -> None:
        if not prompts:
            found = (
                f"all {problems.count} rows are bad; first: {problems.first}"
                if problems.count
                else "0 rows"
            )
            raise UserError(f"no usable prompt in {self.path!r}: {found}; give a file with prompts")
        for field, column in unseen.items():
            raise UserError(
                f"columns: no row read from {self.path!r} has a column {column!r} for {field!r}; "
                "correct the name or leave the field out"
            )
        if problems.count:
            log.warning(
                "skipped %d of %d rows of %s (%s); first: %s",
                problems.count,
                len(prompts) + problems.count,
                self.path,
                problems.by_reason(),
                problems.first,
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
    if number and is_number and (isinstance(value, int) or math.isfinite(value)):
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
        row = strict_json.loads(raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise BadRowError("is nested too deeply to be read") from error
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
