"""Reports of findings, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_lightning.models.strict_json import dumps
from opd_lightning.preflight.finding import Finding

COLOURS = {"ok": "green", "info": "blue", "warning": "yellow", "error": "bold red"}
WIDTH = 100  # characters; longer lines are hard to read


READY, ESTIMATED = "Ready to train", "Estimated, nothing was loaded"


def verdict(findings: Sequence[Finding], ready: str = READY) -> str:
    """Summarise findings in one line; `ready` is what they say without an error."""
    levels = Counter(finding.level for finding in findings)
    if levels["error"]:
        return f"Not ready to train: {_count(levels['error'], 'error')}" + (
            f", {_count(levels['warning'], 'warning')}." if levels["warning"] else "."
        )
    if levels["warning"]:
        return f"{ready}, with {_count(levels['warning'], 'warning')}."
    return f"{ready}."


def as_table(findings: Sequence[Finding], console: Console, ready: str = READY) -> None:
    """Print a row for each finding, with its meaning and what to change below."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.meaning:
            text.append(f"\nmeans: {finding.meaning}", style="dim")
        if finding.change:
            text.append(f"\ndo: {finding.change}", style="bold")
        table.add_row(Text(finding.level, style=COLOURS[finding.level]), finding.subject, text)
    width = min(console.width, WIDTH)
    console.print(table, width=width)
    console.print()
    console.print(verdict(findings, ready), style="bold", width=width)


def as_json(findings: Sequence[Finding], ready: str = READY) -> str:
    """Serialise the verdict, and every finding with its numbers, to one JSON object."""
    whole = {
        "verdict": verdict(findings, ready),
        "ready": not any(finding.level == "error" for finding in findings),
        "findings": [
            asdict(finding) | {"values": {k: float(v) for k, v in finding.values.items()}}
            for finding in findings
        ],
    }
    return dumps(whole)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
