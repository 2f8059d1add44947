"""What `opd validate` and `opd test` found, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from opd_lightning.checkpoints.reading import Saved
from opd_lightning.data.suites import EvaluationSuite
from opd_lightning.harness.exam import Exam

if TYPE_CHECKING:
    from opd_lightning.data.datamodule import RolloutDataModule
    from opd_lightning.methods.base import DistillationModule


WIDTH = 140  # characters, where no terminal sets a limit


def measured(
    module: DistillationModule, data: RolloutDataModule, stage: str, saved: Saved | None
) -> dict[str, Any]:
    """One object: who was measured, and every suite's figures by the names that runs log them by.

    Args:
        module: After the measurement.
        data: Its data.
        stage: "validate" or "test".
        saved: Whose weights were measured; None: the student's folder as it is.
    """
    return {
        "stage": stage,
        "student": {
            "path": module.student.source.path,
            "checkpoint": None if saved is None else str(saved.path),
            "step": None if saved is None else saved.step,
        },
        "seed": data.seed,
        "suites": {name: _suite(name, module, data, stage) for name in module.suites},
    }


def _suite(
    name: str, module: DistillationModule, data: RolloutDataModule, stage: str
) -> dict[str, Any]:
    prefix = f"{'val' if stage == 'validate' else stage}/{name}/"
    figures = {
        key.removeprefix(prefix): value
        for key, value in module.scores.items()
        if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
    }
    loaded, suite = data.loaded(name), data.suites[stage][name]
    if isinstance(loaded, Exam):
        name = loaded.task.task
        return {"task": name, "documents": loaded.documents, "metric": loaded.metric} | figures
    prompts = loaded.prompts
    about: dict[str, Any] = {"prompts": len(prompts)}
    if isinstance(suite, EvaluationSuite):
        about |= {"samples": suite.samples, "sampling": asdict(suite.sampling or data.sampling)}
    domains = {
        domain: {"prompts": sum(prompt.domain == domain for prompt in prompts), **its}
        for domain, its in module.scores_by_domain.get(name, {}).items()
    }
    return about | figures | ({"domains": domains} if domains else {})


def as_json(found: Mapping[str, Any]) -> str:
    """JSON knows neither NaN nor infinity: null stands for them."""
    return json.dumps(_plain(found), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_table(found: Mapping[str, Any], console: Console) -> None:
    """A block for every suite that was answered, domains below it; texts read; tasks."""
    student, suites = found["student"], found["suites"]
    title = student["path"]
    if student["checkpoint"] is not None:
        title = f"{student['checkpoint']} (step {student['step']})"
    answered = {name: suite for name, suite in suites.items() if "samples" in suite}
    console.print(f"[bold]{found['stage']}[/]: {title}", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if answered:
        console.print(_answered(answered))
    tasks = {name: suite for name, suite in suites.items() if "task" in suite}
    if read := {name: suite for name, suite in suites.items() if name not in {**answered, **tasks}}:
        console.print(_read(read))
    if tasks:
        console.print(_tasks(tasks))


def _table(*columns: str) -> Table:
    """An empty one; what its rows are called comes first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=12)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _answered(suites: Mapping[str, Mapping[str, Any]]) -> Table:
    """Columns that no suite has are left out."""
    rows = [row for suite in suites.values() for row in (suite, *_domains(suite).values())]
    keys = {key for row in rows for key in row}
    passes = sorted((key for key in keys if key.startswith("pass_at_")), key=_k)
    shown = [key for key in ("score", *passes, "majority", "length", "truncated") if key in keys]
    titles = {"score": ["score", "95 %"], **{key: [f"pass@{_k(key)}"] for key in passes}}
    table = _table("prompts", *(title for key in shown for title in titles.get(key, [key])))
    for name, suite in suites.items():
        table.add_section()
        several = f", n={suite['samples']}" if suite["samples"] > 1 else ""
        table.add_row(f"[bold]{name}[/]{several}", *_cells(suite, shown))
        for domain, row in _domains(suite).items():
            table.add_row(f"  {domain}", *_cells(row, shown))
    return table


def _cells(row: Mapping[str, Any], shown: list[str]) -> list[str]:
    cells = [str(row["prompts"])]
    for key in shown:
        value = row.get(key)
        form = ".1f" if key == "length" else ".3f"
        cells.append("" if value is None else format(value, form))
        if key == "score":
            known = value is not None
            cells.append(f"{row['score_low']:.3f}-{row['score_high']:.3f}" if known else "")
    return cells


def _read(suites: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("texts", "perplexity", "nats per token", "KL from the start")
    for name, suite in suites.items():
        moved = f"{suite['kl']:.4f}" if "kl" in suite else ""
        loss = f"{-suite['log_likelihood']:.4f}"
        figures = (str(suite["prompts"]), f"{suite['perplexity']:.4g}", loss, moved)
        table.add_row(f"[bold]{name}[/]", *figures)
    return table


def _tasks(suites: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("documents", "judged by", "score", "95 %")
    for name, suite in suites.items():
        ends = f"{suite['score_low']:.3f}-{suite['score_high']:.3f}" if "score_low" in suite else ""
        figures = (str(suite["documents"]), suite["metric"], f"{suite['score']:.3f}", ends)
        table.add_row(f"[bold]{name}[/]", *figures)
    return table


def _domains(suite: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = suite.get("domains", {})
    return found


def _k(key: str) -> int:
    return int(key.removeprefix("pass_at_"))
