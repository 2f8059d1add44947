"""`opd compare`: comparison of runs from their TensorBoard files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.commands.parsers import OneLineParser
from opd_lightning.errors import UserError
from opd_lightning.metrics.directions import direction
from opd_lightning.models.strict_json import dumps
from opd_lightning.run.outputs import check_file

DEFAULT_TAGS = ("val/*/score", "loss", "response/length", "response/truncated")
SECONDS = "time/step_seconds"
EVERY_STEP = "loss"  # logged at the step's index; validations at the number of steps made
PICTURES = (".png", ".svg", ".pdf")


class Curve(NamedTuple):
    """Scalar of one run."""

    steps: np.ndarray  # [n] int64
    values: np.ndarray  # [n] float64


class Line(NamedTuple):
    """Table row: figures of a scalar in one run or a group of runs."""

    run: str
    tag: str
    runs: int
    last: float  # mean over the runs
    low: float  # interval of the last value: one run's logged 95 % interval, or one
    high: float  # standard deviation around the mean of several runs
    best: float | None  # None where neither high nor low values are better
    best_step: int | None
    steps: int  # optimiser steps
    hours: float  # time of these steps, as long as the logged ones on average


def compare(
    runs: list[str],
    tags: list[str] | None = None,
    group: bool = False,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Compare runs: last and best values with intervals, steps, time and curves.

    Args:
        runs: Run folders.
        tags: Names or patterns of scalars, such as val/*/score or overlap/*; the default is
            scores, loss, response length and truncation.
        group: Group runs whose names differ only after the last "-" or "_" (seeds), and report
            mean and standard deviation over them.
        plot: Picture to write (.png, .svg or .pdf), with one panel per scalar.
        json: Print a JSON list, of an object for each run and scalar, instead of a table.
    """
    picture = None if plot is None else _checked(Path(os.path.expanduser(plot)))
    wanted = tags or list(DEFAULT_TAGS)
    curves = {run: read(Path(os.path.expanduser(run))) for run in dict.fromkeys(runs)}
    found = sorted({t for one in curves.values() for t in one if matches(t, wanted)})
    if not found:
        known = sorted({t for one in curves.values() for t in one})
        raise UserError(f"--tags: no scalar matches {wanted}; the runs have {', '.join(known)}")
    groups: dict[str, list[str]] = {}
    for run in curves:
        groups.setdefault(_stem(run) if group else run, []).append(run)
    lines = [
        line(name, tag, [curves[run] for run in members if tag in curves[run]])
        for tag in found
        for name, members in groups.items()
        if any(tag in curves[run] for run in members)
    ]
    if json:
        print(dumps([one._asdict() for one in lines]))
    else:
        Console().print(as_table(lines))
    if picture is not None:
        draw(found, groups, curves, picture)


def _checked(picture: Path) -> Path:
    """Return the file to draw to, if it can be written and its name says a known format."""
    if picture.suffix.lower() not in PICTURES:
        raise UserError(
            f"--plot: got {str(picture)!r}, expected a file that ends with {', '.join(PICTURES)}"
        )
    check_file("--plot", picture)
    return picture


def read(run: Path) -> dict[str, Curve]:
    """Return all scalars of a run. Of a step that a resumed run logged again, the later counts."""
    if not any(run.glob("events.out.tfevents.*")):
        raise UserError(
            f"{str(run)!r} holds no TensorBoard file; name the folder of a run that logs with a "
            "TensorBoardLogger"
        )
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        values = {point.step: point.value for point in events.Scalars(tag)}
        steps = sorted(values)
        curves[tag] = Curve(np.array(steps), np.array([values[s] for s in steps], dtype=float))
    return curves


def matches(tag: str, wanted: Sequence[str]) -> bool:
    """Return whether a pattern matches the tag; `*` does not match a slash."""
    return any(fnmatch(tag, one) and tag.count("/") == one.count("/") for one in wanted)


def line(name: str, tag: str, runs: Sequence[dict[str, Curve]]) -> Line:
    """Return the figures of a scalar in a group of runs."""
    lasts = np.array([run[tag].values[-1] for run in runs])
    if len(runs) > 1:
        spread = float(lasts.std(ddof=1))
        low, high = float(lasts.mean()) - spread, float(lasts.mean()) + spread
    else:
        bounds = (runs[0].get(f"{tag}_{side}") for side in ("low", "high"))
        low, high = (float("nan") if b is None else float(b.values[-1]) for b in bounds)
    best = [_best(run[tag], sign) for run in runs] if (sign := direction(tag)) else []
    # Not every step may be logged.
    seconds = [
        run[SECONDS].values.mean() * _steps(run) if SECONDS in run else np.nan for run in runs
    ]
    return Line(
        run=name,
        tag=tag,
        runs=len(runs),
        last=float(lasts.mean()),
        low=low,
        high=high,
        best=float(np.mean([value for value, _ in best])) if best else None,
        best_step=round(float(np.mean([step for _, step in best]))) if best else None,
        steps=max(_steps(run) for run in runs),
        hours=float(np.mean(seconds)) / 3600,
    )


def _best(curve: Curve, sign: int) -> tuple[float, int]:
    """Return the best value that is a number, and its step; `sign` is that of `direction`."""
    ranks = np.where(np.isnan(curve.values), -np.inf, sign * curve.values)
    i = int(ranks.argmax())
    return float(curve.values[i]), int(curve.steps[i])


def _steps(run: dict[str, Curve]) -> int:
    """Return the number of optimiser steps of a run, from its steps and validations."""
    made = [int(curve.steps[-1]) for tag, curve in run.items() if tag.startswith("val/")]
    if EVERY_STEP in run:
        made.append(int(run[EVERY_STEP].steps[-1]) + 1)
    return max(made, default=0)


def as_table(lines: Sequence[Line]) -> Table:
    """Return a table with a section per scalar and a row per run or group."""
    table = Table(pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("last", "interval", "best", "at step", "steps", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {one.run: Path(one.run).name for one in lines}
    if len(set(names.values())) < len(names):
        names = {run: run for run in names}
    before = ""
    for one in lines:
        if one.tag != before:
            table.add_section()
            table.add_row(f"[bold]{one.tag}")
            before = one.tag
        table.add_row(
            f"  {names[one.run]}" + ("" if one.runs == 1 else f" ({one.runs} runs, sd)"),
            f"{one.last:.3g}",
            "" if np.isnan(one.low) else f"{one.low:.3f}-{one.high:.3f}",
            "" if one.best is None else f"{one.best:.3g}",
            "" if one.best_step is None else str(one.best_step),
            str(one.steps),
            "" if np.isnan(one.hours) else f"{one.hours:.2f}",
        )
    return table


def draw(
    tags: Sequence[str],
    groups: dict[str, list[str]],
    curves: dict[str, dict[str, Curve]],
    picture: Path,
) -> None:
    """Plot one panel per scalar: runs as lines, a colour per group, logged intervals shaded."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = -(-len(tags) // 2)
    columns = min(2, len(tags))
    figure, panels = plt.subplots(
        rows, columns, figsize=(6 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for tag, panel in zip(tags, panels.flat, strict=False):
        for number, (name, members) in enumerate(groups.items()):
            for i, run in enumerate(r for r in members if tag in curves[r]):
                curve = curves[run][tag]
                label = name if i == 0 else None
                panel.plot(curve.steps, curve.values, color=f"C{number}", lw=1.2, label=label)
                low, high = (curves[run].get(f"{tag}_{side}") for side in ("low", "high"))
                if len(members) == 1 and low is not None and high is not None:
                    shade = {"color": f"C{number}", "alpha": 0.15}
                    panel.fill_between(low.steps, low.values, high.values, **shade)
        panel.set(title=tag, xlabel="optimiser step")
        panel.legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(args: list[str]) -> None:
    """Entry point of `opd compare`."""
    parser = OneLineParser(prog="opd compare", description="Runs side by side.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_function_arguments(compare, skip={"runs"})
    compare(**parser.parse_args(args).as_dict())


def _stem(run: str) -> str:
    path = Path(run)
    cut = max(path.name.rfind("-"), path.name.rfind("_"))
    return str(path.with_name(path.name[:cut])) if cut > 0 else run
