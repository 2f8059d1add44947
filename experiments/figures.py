"""Figures of other runs as scores: what they logged, and what their tests reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def logged(
    *, run: str, figures: Mapping[str, Sequence[str]], steps: Sequence[int], seed: int
) -> dict[str, float]:
    """Return means over steps of what a run logged.

    Args:
        run: Name of the run, which is done.
        figures: Names in the log by name of the score, which is their mean.
        steps: First step, from 0, and the one behind the last.
        seed: Not used: the log is in the folder of the seed, which is the current one.
    """
    events = events_of(run)
    first, end = steps
    return {
        score: mean(
            event.value
            for name in names
            for event in events.Scalars(name)
            if first <= event.step < end
        )
        for score, names in figures.items()
    }


def reported(
    *, run: str, suite: str, domain: str | None = None, figures: Sequence[str], seed: int
) -> dict[str, float]:
    """Return what the test of a run reported.

    Args:
        run: Name of the run, which is done.
        suite: Name of the suite.
        domain: Domain of its prompts; None for all.
        figures: Names in the report, such as length.
        seed: Not used: the report is in the folder of the seed, which is the current one.
    """
    report = Path("scores", f"{run}.report.json").read_text(encoding="utf-8")
    row = json.loads(report)["suites"][suite]
    if domain is not None:
        row = row["domains"][domain]
    return {figure: row[figure] for figure in figures}


def curve(*, run: str, figures: Mapping[str, str], seed: int) -> dict[str, float]:
    """Return what a run logged at every step where it did, as "SCORE, step N".

    With them `tokens`, those of all responses that it was trained on.

    Args:
        run: Name of the run, which is done.
        figures: Name in the log by name of the score.
        seed: Not used: the log is in the folder of the seed, which is the current one.
    """
    events = events_of(run)
    values = {
        f"{score}, step {event.step}": event.value
        for score, name in figures.items()
        for event in events.Scalars(name)
    }
    return values | {"tokens": sum(e.value for e in events.Scalars("response/tokens_per_step"))}


def events_of(run: str) -> EventAccumulator:
    """Return what a run logged."""
    events = EventAccumulator(str(Path("runs", run)), size_guidance={"scalars": 0})
    events.Reload()
    return events
