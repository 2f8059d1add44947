"""The runs of a study: what is missing is trained and measured, each in a process of its own.

Every seed has a folder with `lab/`, `configs/` and `runs/NAME/`, as configurations name them. A run
is done when its scores are written, and locked while a process works on it. Scores that are on
record (`records.py`) of the same build of the lab are not measured again.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from experiments.records import Result, build_of, read_record
from experiments.study import ROOT, Run, Study
from opd_lightning.cli import main as opd
from opd_lightning.errors import UserError

QUIET = "--trainer.enable_progress_bar=false"
UNWATCHED = "--trainer.limit_val_batches=0"  # the last checkpoint is measured, no other is chosen
WAIT = 5.0  # seconds between looks at what other processes work on


@dataclass(frozen=True)
class Place:
    """A run of one seed, and its files."""

    name: str
    seed: int
    work: Path  # of the world
    settings: str  # the digest that `Study.settings` returns

    @property
    def root(self) -> Path:
        return self.work / str(self.seed)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def scores(self) -> Path:
        return self.root / "scores" / f"{self.name}.json"

    @property
    def used(self) -> Path:
        """File of the cost of all attempts."""
        return self.root / "scores" / f"{self.name}.used"

    @property
    def begun(self) -> Path:
        """File of the settings that the run was begun with."""
        return self.root / "scores" / f"{self.name}.settings"

    def is_done(self) -> bool:
        return self.scores.exists() and self.has_settings()

    def has_settings(self) -> bool:
        """Return whether the run was begun with its present settings."""
        return self.begun.exists() and self.begun.read_text(encoding="utf-8") == self.settings

    def result(self) -> Result:
        """Return the result of a run that is done."""
        return Result(scores=json.loads(self.scores.read_text(encoding="utf-8")), **self.cost())

    def cost(self) -> dict[str, float]:
        """Return what all attempts have used: `cpu_seconds`, and `memory` in GiB."""
        nothing = {"cpu_seconds": 0.0, "memory": 0.0}
        return json.loads(self.used.read_text(encoding="utf-8")) if self.used.exists() else nothing

    def add_cost(self, usage: resource.struct_rusage) -> None:
        """Add what an attempt used."""
        before = self.cost()
        cost = {
            "cpu_seconds": before["cpu_seconds"] + cpu_seconds(usage),
            "memory": max(before["memory"], usage.ru_maxrss / 2**20),  # of KiB
        }
        self.used.write_text(json.dumps(cost), encoding="utf-8")


def cpu_seconds(usage: resource.struct_rusage) -> float:
    """Return the CPU seconds of a process, those of the system included."""
    return usage.ru_utime + usage.ru_stime


def place_of(study: Study, name: str, seed: int, work: Path) -> Place:
    """Return the place of a study's run."""
    return Place(name, seed, work, study.settings(name))


def lab_build(study: Study, seed: int, work: Path) -> str | None:
    """Return the digest of the weights of a seed's lab; None if it is not built."""
    return build_of(work / str(seed) / "lab" / study.world)


def places(study: Study, seeds: Sequence[int], only: str, work: Path) -> list[Place]:
    """Return the runs whose names match `only` and that have no scores yet, and those that they
    read, by seed.
    """
    record = read_record(study)
    found = []
    for seed in seeds:
        own = record.get(lab_build(study, seed, work) or "", {})
        names = {
            name for name in study.runs if fnmatch(name, only) and seed not in own.get(name, {})
        }
        for name in reversed(study.runs):
            if name in names:
                names.update(study.runs[name].after)
        found += [place_of(study, name, seed, work) for name in study.runs if name in names]
    return found


def run_missing(study: Study, seeds: Sequence[int], only: str, work: Path) -> int:
    """Run what is not done and not worked on by another process; wait for what is.

    Returns:
        The exit code: 1 if runs failed, which are named, with the file of their output.
    """
    for seed in seeds:
        output = work / str(seed) / "lab.out"
        if not build_labs_apart(study, work / str(seed), output):
            print(f"the labs of seed {seed} could not be built, see {output}", flush=True)
            return 1
    missing = places(study, seeds, only, work)
    failed: list[Place] = []
    while missing:
        before = len(missing)
        for place in [*missing]:
            needs = [
                place_of(study, name, place.seed, work) for name in study.runs[place.name].after
            ]
            if place.is_done():
                missing.remove(place)
            elif any(need in failed for need in needs):
                missing.remove(place)
                failed.append(place)
            elif all(need.is_done() for need in needs):
                with locked(place) as is_ours:
                    if is_ours and not place.is_done():
                        missing.remove(place)
                        if not run_apart(study, place):
                            failed.append(place)
        if missing and len(missing) == before:  # others work on them
            time.sleep(WAIT)
    return 1 if failed else 0


@contextmanager
def locked(place: Place) -> Iterator[bool]:
    """Lock the run inside the context; yield whether the lock was acquired."""
    place.scores.parent.mkdir(parents=True, exist_ok=True)
    with place.scores.with_suffix(".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def build_labs_apart(study: Study, root: Path, output: Path) -> bool:
    """Build the labs of a seed that are missing, in a forked process; return whether they exist.

    Wait for another process that builds them.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lab.lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return apart(lambda: build_labs(study, root), output)[0]


def build_labs(study: Study, root: Path) -> None:
    """Build the labs that a study's configurations name, unless they exist."""
    os.chdir(root)
    for link in (Path("configs"), Path("experiments")):
        if not link.exists():
            link.unlink(missing_ok=True)  # of a project that was moved
            link.symlink_to(ROOT / link)
    if not Path("lab", study.world).exists():
        opd(["lab", "build", "--world", study.world])
    for lab, words in study.labs.items():
        if not Path("lab", lab).exists():
            opd(["lab", "build", "--link", f"lab/{lab}", *words])


def run_apart(study: Study, place: Place) -> bool:
    """Train and measure in a forked process; return whether it ended well."""
    began = time.monotonic()
    output = place.scores.with_suffix(".out")
    ended_well, usage = apart(lambda: train_and_measure(study, place), output)
    place.add_cost(usage)
    ended = "done" if place.is_done() else f"failed, see {output}"
    took = time.monotonic() - began
    print(
        f"{place.name}, seed {place.seed}: {ended} ({took:.0f} s, CPU {cpu_seconds(usage):.0f} s)",
        flush=True,
    )
    return ended_well and place.is_done()


def apart(function: Callable[[], None], output: Path) -> tuple[bool, resource.struct_rusage]:
    """Call a function in a forked process whose output is appended to a file.

    Returns:
        Whether it returned, and what the process used.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with output.open("a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            function()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except UserError as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, state, usage = os.wait4(pid, 0)
    return state == 0, usage


def train_and_measure(study: Study, place: Place) -> None:
    """Train the run's student, export it, and write its scores on the study's test suites."""
    os.chdir(place.root)
    if place.begun.exists() and not place.has_settings():
        raise UserError(
            f"{place.begun}: the run was begun with other settings than the study's present ones; "
            f"remove {place.folder} and the files {place.begun.with_suffix('.*')}"
        )
    place.begun.write_text(place.settings, encoding="utf-8")
    run = study.runs[place.name]
    if run.measure is not None:
        found = resolve_name(run.measure)(seed=place.seed, **run.set)
    else:
        found = test(study, run.student or train(run, place), place)
    partial = place.scores.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(place.scores)


def test(study: Study, student: str, place: Place) -> dict[str, float]:
    """Return the scores of a student's folder on the study's test suites."""
    report = place.scores.with_suffix(".report.json")
    run = study.runs[place.name]
    own = options(run) if run.student else []
    words = ["--config", study.test, f"--model.student.path={student}", QUIET, *own]
    opd(["test", *words, "--out", str(report)])
    return scores_of(json.loads(report.read_text(encoding="utf-8")))


def train(run: Run, place: Place) -> str:
    """Train from where an earlier attempt stopped; return the exported student's folder.

    The checkpoints are removed.
    """
    student = place.folder / "student"
    if not student.exists():
        opd([*fit_words(run, place), "--ckpt_path", "last"])
        saved = ["--config", str(place.folder / "config.yaml"), "--ckpt_path", "last"]
        opd(["export", *saved, "--out", str(student)])
    # Each takes up to 12 bytes a weight, and nothing reads them any more.
    shutil.rmtree(place.folder / "checkpoints", ignore_errors=True)
    return str(student)


def fit_words(run: Run, place: Place) -> list[str]:
    """Return the command line that trains a run."""
    assert run.config is not None
    to = f"--trainer.logger.init_args.save_dir=runs/{place.name}"
    return [
        "fit",
        "--config",
        run.config,
        f"--seed_everything={place.seed}",
        to,
        QUIET,
        UNWATCHED,
        *options(run),
    ]


def options(run: Run) -> list[str]:
    """Return the run's own options."""
    return [f"--{key}={as_word(value)}" for key, value in run.set.items()]


def as_word(value: Any) -> str:
    """Return a value as on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def scores_of(report: dict[str, Any]) -> dict[str, float]:
    """Return the scores in what `opd test --out` wrote, as SUITE and SUITE/DOMAIN.

    The score of texts is their log-likelihood, in nats a token.
    """
    scores = {}
    for suite, row in report["suites"].items():
        scores[suite] = row["score"] if "score" in row else row["log_likelihood"]
        for domain, own in row.get("domains", {}).items():
            scores[f"{suite}/{domain}"] = own["score"]
    return scores
