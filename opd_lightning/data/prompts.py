"""Prompt files: JSON lines, parquet or a saved dataset, read to a checked list of prompts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opd_lightning.data.chats import Chat, encodable, read_chat
from opd_lightning.data.layouts import FIELDS, Layout, has_column, layout_of
from opd_lightning.data.order import PromptOrder
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.row_report import Problems, Texts
from opd_lightning.data.rows import BadRowError, Row, read_rows, shown
from opd_lightning.errors import UserError, cut
from opd_lightning.models import strict_json
from opd_lightning.types import Message, Prompt

log = logging.getLogger(__name__)

BATCH = 256  # rows that are read and tokenised together
NUMBERS_TOO = ("answer", "id")  # fields where 7 is as good as "7"


Sizes = Callable[["PromptSource"], int | None]  # see `PromptSource.load`


class _Used(NamedTuple):
    """Parsed row, used if it passes the checks."""

    prompt: Prompt
    layout: Layout
    chat: Chat


class _Seen:
    """Ids, domains and missing columns of the rows read so far."""

    def __init__(self, columns: dict[str, str]) -> None:
        self.lacking = columns  # columns that no row had, by field
        self.lines: dict[str, int] = {}  # by id of the prompt
        self.domains: set[str] = set()


class PromptSource:
    """A file or folder of prompts.

    Args:
        path: A .jsonl or .parquet file, or a folder written by `datasets.Dataset.save_to_disk`;
            `~` is the home folder.
        columns: Columns of the file by field, as field: column, or field: column.key for a key in
            a nested column. The fields are messages (a chat, or text that becomes one user
            message; an assistant's turn at its end is the response), system (a system message),
            answer, response, privileged, domain, id and response_ids (the recorded response as
            token ids, EOS included, which is never tokenised again); input (text that continues a
            user message, on a new line) and history (earlier turns as pairs of texts). A field
            that is not listed is read from the column of its name, without input and history.
            Without a column messages, the column prompt is read. Rows of Alpaca, ShareGPT and
            verl are recognised by their columns, unless messages is listed.
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
        self.name = ""  # among the sources of a mixture: begins ids, and is the default domain
        self.skipped = 0

    @property
    def file(self) -> Path | None:
        """The file or folder that is read; None where prompts come from somewhere else."""
        return Path(self.path)

    def parts(self) -> dict[str, PromptSource]:
        """Return the sources that are read, by the rest of their configuration keys."""
        return {"": self}

    def order(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> PromptOrder:
        """Return the order in which training takes the prompts, `per_step` a step."""
        return PromptOrder(len(prompts), seed)

    def load(self, sizes: Sizes | None = None, checks: RowChecks | None = None) -> list[Prompt]:
        """Read every usable row, in the order of the file.

        Args:
            sizes: Returns up to how many bytes the JSON lines of a source are read, or None for
                all; None reads all.
            checks: What a row has to pass besides; None uses every row that can be read.

        Raises:
            UserError: The file cannot be read, a row cannot be used (unless such rows are
                skipped), or no row can.
        """
        prompts: list[Prompt] = []
        problems = Problems()
        seen = _Seen(dict(self.columns))
        texts = Texts(self.path, checks)
        rows = self.rows(sizes(self) if sizes else None)
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
                    texts.see(one.prompt, one.layout, one.chat)
        self.skipped = problems.count
        self._report(prompts, problems, seen.lacking)
        texts.report(len(prompts))
        return prompts

    def rows(self, size: int | None) -> Iterator[tuple[int, Row]]:
        """Yield the number of each row from 1, and the row. A subclass may make rows instead."""
        return read_rows(self.path, size)

    def _read(
        self, line: int, raw: Any, seen: _Seen, checks: RowChecks | None
    ) -> _Used | BadRowError | None:
        """Return a row as a prompt, or why it is none; None if it is of a domain not asked for."""
        try:
            if isinstance(raw, BadRowError):
                raise raw
            row = _decode(raw) if isinstance(raw, bytes) else raw
            seen.lacking = {
                field: name for field, name in seen.lacking.items() if not has_column(row, name)
            }
            layout = layout_of(row, self.columns)
            prompt, chat = self._prompt(row, line, layout)
            if prompt.id in seen.lines:
                earlier = seen.lines[prompt.id]
                raise BadRowError(f"'id' must be unique, got {prompt.id!r} as in row {earlier}")
            prompt = self._without_control_tokens(prompt, checks)
        except BadRowError as error:
            return BadRowError(f"{self.path}:{line}: {error}")
        seen.lines[prompt.id] = line
        seen.domains.add(prompt.domain)
        wanted = self.domains is None or prompt.domain in self.domains
        return _Used(prompt, layout, chat) if wanted else None

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
            raise BadRowError(f"must not hold control tokens as text, got {cut(repr(token))}")
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

    def _prompt(self, row: Mapping[str, Any], line: int, layout: Layout) -> tuple[Prompt, Chat]:
        texts = {
            field: _text(layout.value(row, field), layout.columns[field], field in NUMBERS_TOO)
            for field in ("system", "answer", "response", "privileged", "domain", "id", "input")
            if field in layout.columns
        }
        chat = read_chat(
            layout.value(row, "messages"),
            layout.columns["messages"],
            row,
            system=texts["system"],
            history=layout.value(row, "history"),
            more=texts.get("input") or "",
        )
        own_id = texts["id"] or f"{Path(self.path).stem}:{line}"
        prompt = Prompt(
            id=f"{self.name}/{own_id}" if self.name else own_id,
            messages=chat.messages,
            answer=texts["answer"],
            response=_response(texts["response"], chat.response, layout),
            response_ids=_ids(layout.value(row, "response_ids"), layout.columns["response_ids"]),
            privileged=texts["privileged"],
            domain=texts["domain"] or self.name or "default",
            origin=f"{self.path}:{line}",
        )
        return prompt, chat


def _response(given: str | None, last: str | None, layout: Layout) -> str | None:
    """Return the recorded response, from its column or the end of the chat."""
    if given is not None and last is not None and given != last:
        raise BadRowError(
            f"must have one response, got {layout.columns['response']!r} and another as the "
            f"assistant's last turn in {layout.columns['messages']!r}; remove one of them"
        )
    return last if given is None else given


def _text(value: Any, column: str, number: bool) -> str | None:
    """Return the text in a column, or None; a number becomes one without exponent, if `number`."""
    if value is None:
        return None
    if isinstance(value, str):
        return encodable(value, column)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if number and is_number and (isinstance(value, int) or math.isfinite(value)):
        return str(value) if isinstance(value, int) else f"{Decimal(str(value)):f}"
    expected = "a text or a finite number" if number else "a text"
    raise BadRowError(f"{column!r} must be {expected}, got {shown(value)}")


def _ids(value: Any, column: str) -> tuple[int, ...] | None:
    """Return the token ids in a column, or None."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column!r} must be a list of token ids, got {shown(value)}")
    for i, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise BadRowError(f"'{column}[{i}]' must be a token id, got {shown(token)}")
    return tuple(value)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        row = strict_json.loads(raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise BadRowError("is nested too deeply to be read") from error
    except UnicodeDecodeError as error:
        raise BadRowError(f"must be UTF-8, got a bad byte at position {error.start}") from error
    except ValueError as error:
        raise BadRowError(
            f"must be one JSON object per line, got {shown(raw)} ({error})"
        ) from error
    if not isinstance(row, dict):
        raise BadRowError(f"must be one JSON object per line, got {shown(row)}")
    return row
