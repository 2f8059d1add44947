"""A finding: what was looked at, what was found, what it means, what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from opd_lightning.errors import UserError

Level = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Levels: "ok"; "info" is worth knowing and needs nothing; "warning" trains, perhaps not what is
    meant; "error" stops a run, or makes it learn from wrong numbers.
    """

    level: Level
    subject: str  # what was looked at
    found: str
    meaning: str = ""
    change: str = ""
    values: Mapping[str, float] = field(default_factory=dict)  # the numbers, for `--json`


def attempt(subject: str, check: Callable[[], object]) -> list[Finding]:
    """What a check that raises says, as a finding; nothing if it says nothing.

    Libraries and servers report what they cannot do as RuntimeError, tensors that do not fit too.
    """
    try:
        check()
    except (UserError, RuntimeError) as error:
        return [Finding("error", subject, " ".join(str(error).split())[:400])]
    return []


def gather(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    """All of them; what breaks them off, as `attempt` has it, becomes the last."""
    found: list[Finding] = []
    broken = attempt(subject, lambda: found.extend(findings))
    return found + broken
