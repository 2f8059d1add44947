"""The figures of `opd validate` and `opd test`, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from opd_lightning.checkpoints.reading import Saved
from opd_lightning.evaluation.base import Bench, Suite
from opd_lightning.evaluation.module import EvaluatedModule

WIDTH = 140  # characters, if the output is not a terminal


def measured(
    module: EvaluatedModule,
    suites: Mapping[str, Suite],
    loaded: Mapping[str, Any],
    bench: Bench,
    stage: str,
    saved: Saved | None,
) -> dict[str, Any]:
    """Collect the measured student and every suite's figures, by their logged names.

    Args:
        module: After the measurement.
        suites: The suites of the stage, by name.
        loaded: What each suite's `load` returned.
        bench: The bench that the suites used.
        stage: "validate" or "test".
        saved: Checkpoint whose weights were measured; None for the student's folder as it is.
    """
    prefix = "val" if stage == "validate" else stage
    return {
        "stage": stage,
        "student": {
            "path": module.student.source.path,
            "checkpoint": None if saved is None else str(saved.path),
            "step": None if saved is None else saved.step,
        },
        "seed": bench.seed,
        "suites": {
            name: suite.report_row(
                loaded[name],
                _figures(module.scores, f"{prefix}/{name}/"),
                module.scores_by_domain.get(name, {}),
                bench,
            )
            for name, suite in suites.items()
        },
    }


def _figures(scores: Mapping[str, float], prefix: str) -> dict[str, float]:
    own = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
    return {name: value for name, value in own.items() if "/" not in name}


def as_table(found: Mapping[str, Any], suites: Mapping[str, Suite], console: Console) -> None:
    """Print a block for every kind of suite.

    Args:
        found: Return value of `measured`.
        suites: The suites, by name.
        console: Where to print.
    """
    student = found["student"]
    title = student["path"]
    if student["checkpoint"] is not None:
        title = f"{student['checkpoint']} (step {student['step']})"
    console.print(f"[bold]{found['stage']}[/]: {title}", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for kind in dict.fromkeys(type(suite) for suite in suites.values()):
        rows = {k: row for k, row in found["suites"].items() if type(suites[k]) is kind}
        console.print(kind.report_table(rows))
