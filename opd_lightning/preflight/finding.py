"""Findings: what was checked, the result, its meaning, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from opd_lightning.errors import UserError, reason_of

Level = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Levels: "ok"; "info" needs no action; "warning" trains, but perhaps not as intended; "error"
    stops a run, or makes it learn from wrong numbers.
    """

    level: Level
    subject: str  # what was checked
    found: str
    meaning: str = ""
    change: str = ""
    values: Mapping[str, float] = field(default_factory=dict)  # the numbers, for `--json`


def attempt(subject: str, check: Callable[[], object]) -> list[Finding]:
    """Run a check and return its exception as a finding; none if it raises nothing.

    Libraries and servers raise RuntimeError for unsupported requests, and so does torch without
    memory.
    """
    try:
        check()
    except (UserError, RuntimeError) as error:
        return [Finding("error", subject, reason_of(error, 400))]
    return []


def gather(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    """Collect findings; an exception, as in `attempt`, becomes the last one."""
    found: list[Finding] = []
    broken = attempt(subject, lambda: found.extend(findings))
    return found + broken
