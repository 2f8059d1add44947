"""Scores on record: `experiments/records/WORLD.json`, so that a study goes on on another machine.

A record holds for every run the digest of its settings, and for every seed the CPU seconds and the
scores. Those of other settings than the study's present ones are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.study import ROOT, Study

FOLDER = ROOT / "experiments" / "records"


@dataclass(frozen=True)
class Result:
    """The scores of a run of one seed, by name, and what they cost."""

    cpu_seconds: float
    scores: Mapping[str, float]


Results = dict[str, dict[int, Result]]  # by run and seed


def read_record(study: Study, folder: Path = FOLDER) -> Results:
    """Return what is on record of a study's runs, with its present settings."""
    saved = _read(folder / f"{study.world}.json")
    found: Results = {}
    for run in study.runs:
        own = saved.get(run, {})
        is_current = own.get("settings") == study.settings(run)
        seeds = own["seeds"] if is_current else {}
        found[run] = {int(seed): Result(**values) for seed, values in seeds.items()}
    return found


def write_record(study: Study, results: Results, folder: Path = FOLDER) -> None:
    """Put results on record; those of runs with other settings are replaced."""
    path = folder / f"{study.world}.json"
    saved = _read(path)
    before = read_record(study, folder)
    for run, own in results.items():
        seeds = {**before[run], **own}
        if seeds:
            rows = {str(seed): asdict(seeds[seed]) for seed in sorted(seeds)}
            saved[run] = {"settings": study.settings(run), "seeds": rows}
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
