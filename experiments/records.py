"""Scores on record: `experiments/records/WORLD.json`, so that a study goes on on another machine.

A record holds for every run the digest of its settings, and for every build of the lab and every
seed the scores and what they cost. Those of other settings than the study's present ones are not
read. Another processor trains other weights with the same seeds, so that only runs of the same
build of the lab can be compared seed by seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.study import ROOT, Study

FOLDER = ROOT / "experiments" / "records"


@dataclass(frozen=True)
class Result:
    """The scores of a run of one seed, by name, and what they cost.

    Args:
        cpu_seconds: Of all attempts, measurement included.
        scores: By name.
        memory: The largest resident size of an attempt's process in GiB; None if not measured.
    """

    cpu_seconds: float
    scores: Mapping[str, float]
    memory: float | None = None


Results = dict[str, dict[int, Result]]  # by run and seed
Record = dict[str, Results]  # by build of the lab


def build_of(lab: Path) -> str | None:
    """Return a digest of a lab's weights; None for a lab that is not built."""
    if not lab.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(lab.resolve().rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def read_record(study: Study, folder: Path = FOLDER) -> Record:
    """Return what is on record of a study's runs, with its present settings."""
    saved = _read(folder / f"{study.world}.json")
    found: Record = {}
    for run in study.runs:
        own = saved.get(run, {})
        is_current = own.get("settings") == study.settings(run)
        for build, seeds in (own["builds"] if is_current else {}).items():
            results = found.setdefault(build, {name: {} for name in study.runs})
            results[run] = {int(seed): Result(**values) for seed, values in seeds.items()}
    return found


def write_record(study: Study, record: Record, folder: Path = FOLDER) -> None:
    """Put results on record; those of runs with other settings are replaced."""
    path = folder / f"{study.world}.json"
    saved = _read(path)
    before = read_record(study, folder)
    for run in study.runs:
        builds = {}
        for build in sorted(before.keys() | record.keys()):
            seeds = before.get(build, {}).get(run, {}) | record.get(build, {}).get(run, {})
            if seeds:
                builds[build] = {str(seed): asdict(seeds[seed]) for seed in sorted(seeds)}
        if builds:
            saved[run] = {"settings": study.settings(run), "builds": builds}
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def comparable(study: Study, record: Record) -> Results:
    """Return for every seed the results of one build of the lab: the one with the most runs."""
    found: Results = {name: {} for name in study.runs}
    for seed in sorted({seed for own in record.values() for run in own.values() for seed in run}):
        chosen = max(
            sorted(record), key=lambda build: sum(seed in r for r in record[build].values())
        )
        for name, seeds in record[chosen].items():
            if seed in seeds:
                found[name][seed] = seeds[seed]
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
