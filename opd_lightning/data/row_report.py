"""Counts of faulty rows of a prompt file by reason, and one warning for each kind."""

from __future__ import annotations

import logging
from collections import Counter

from opd_lightning.data.chats import Chat
from opd_lightning.data.layouts import Layout
from opd_lightning.data.row_checks import RowChecks, texts_of
from opd_lightning.errors import note
from opd_lightning.processes import rank
from opd_lightning.types import Prompt

log = logging.getLogger(__name__)


class Problems:
    """Counts of skipped rows by reason, and the first message."""

    def __init__(self) -> None:
        self.first = ""
        self._counts: Counter[str] = Counter()

    def add(self, reason: str, message: str) -> None:
        self.first = self.first or message
        self._counts[reason] += 1

    @property
    def count(self) -> int:
        return self._counts.total()

    def by_reason(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self._counts.most_common())


class Texts:
    """Texts of used rows that the models tokenize otherwise than their author may expect.

    Args:
        path: The prompt file.
        checks: Checks with the tokenizer; None finds no control tokens or characters.
    """

    def __init__(self, path: str, checks: RowChecks | None) -> None:
        self.path = path
        self.checks = checks
        self.control: list[tuple[str, str]] = []  # origins and tokens
        self.both: dict[tuple[str, str], list[str]] = {}  # origins, by the columns
        self.layouts: dict[str, dict[str, str]] = {}  # recognised columns by field, by layout
        self.unread: dict[str, list[str]] = {}  # origins, by key of a message
        self.characters: dict[str, str] = {}  # origin of the first row with it, by character

    def see(self, prompt: Prompt, layout: Layout, chat: Chat) -> None:
        """Record the findings of a used row."""
        if layout.unread is not None:
            self.both.setdefault((layout.columns["messages"], layout.unread), []).append(
                prompt.origin
            )
        if layout.name is not None:
            self.layouts.setdefault(layout.name, {}).update(layout.recognised)
        for key in sorted(chat.unread):
            self.unread.setdefault(key, []).append(prompt.origin)
        if self.checks is None:
            return
        if (token := self.checks.control_token(prompt)) is not None:
            self.control.append((prompt.origin, token))
        read = self.checks.without_control("\n".join(texts_of(prompt)))
        for character in {*read} - self.characters.keys():
            self.characters[character] = prompt.origin

    def report(self, rows: int) -> None:
        """Warn, once for each kind, with the number of rows and the first one."""
        for layout, columns in self.layouts.items() if rank() == 0 else ():
            read = ", ".join(f"{field} from {column}" for field, column in columns.items())
            note(f"{self.path}: rows are read as {layout}: {read}; columns: {{...}} reads others")
        for (column, other), origins in self.both.items():
            log.warning(
                "%d of %d rows of %s have both %r and %r, of which %r is read; choose with "
                "columns: {messages: ...}; first: %s",
                len(origins),
                rows,
                self.path,
                column,
                other,
                column,
                origins[0],
            )
        for key, origins in self.unread.items():
            log.warning(
                "messages of %d of %d rows of %s hold %r, which is not read: a chat template is "
                "given role and content; first: %s",
                len(origins),
                rows,
                self.path,
                key,
                origins[0],
            )
        if self.control:
            log.warning(
                "%d of %d rows of %s hold a control token as text, which is read as the token; set "
                "on_control_tokens to error or escape; first: %s: %r",
                len(self.control),
                rows,
                self.path,
                *self.control[0],
            )
        unreadable = self.checks.unreadable({*self.characters}) if self.checks else set()
        if unreadable:
            first = next(one for one in self.characters if one in unreadable)
            log.warning(
                "the tokenizer lacks %d characters of %s, which no model can read in them: %s; "
                "first: %s",
                len(unreadable),
                self.path,
                "".join(sorted(unreadable))[:40],
                self.characters[first],
            )
