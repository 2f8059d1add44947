"""A study: the runs that test a paper's claims, and what the claims say about their scores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from opd_lightning.errors import UserError

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent.name for path in Path(__file__).parent.glob("*/study.yaml"))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: trained by `opd fit`, or measured as it is; or another measurement.

    Exactly one of `config`, `student` and `measure` is given.

    Args:
        config: Configuration, from the project's folder.
        student: Folder of a student that is measured without training.
        measure: Function that returns the scores, by name: `package.module.function`.
        set: Options that differ from the configuration, as on the command line of `opd fit`; of
            `opd test` for a `student`; or arguments of the function, which gets the seed as
            `seed`, too.
        after: Runs whose students this one reads, as runs/NAME/student.
    """

    config: str | None = None
    student: str | None = None
    measure: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Students trained one after the other: runs NAME-1, NAME-2, ..., each from the one before.

    The first begins with the student that its options name.

    Args:
        config: Configuration of all, from the project's folder.
        links: Options of each that differ from the configuration.
        set: Options of all.
        after: Runs whose students they read besides.
    """

    config: str
    links: list[dict[str, Any]]
    set: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)

    def runs(self, name: str) -> dict[str, Run]:
        """Return the runs of the chain by name."""
        found: dict[str, Run] = {}
        for number, own in enumerate(self.links, 1):
            values, after = self.set | own, self.after
            if found:
                before = f"{name}-{number - 1}"
                values |= {"model.student.path": f"runs/{before}/student"}
                after = [*after, before]
            found[f"{name}-{number}"] = Run(config=self.config, set=values, after=after)
        return found


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A comparison of two runs, seed by seed.

    Args:
        says: The claim, in a sentence.
        source: Where the paper says so.
        run: Name of the run.
        than: Name of the run that it is compared with.
        score: Name of the score, SUITE or SUITE/DOMAIN.
        expects: The sign of run - than, or that both are as good.
        margin: Differences up to this one are as good; read by "equal" only.
    """

    says: str
    source: str
    run: str
    than: str
    score: str
    expects: Literal["higher", "lower", "equal"] = "higher"
    margin: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs, and claims about them.

    Args:
        name: Folder in experiments/.
        world: Lab of its runs. Studies of a world share the runs that have the same name.
        page: Page in docs/ that shows the tables.
        seeds: Number of seeds, from 0.
        runs: Runs by name, each after those that it reads.
        claims: Claims by name.
        suites: Configuration with the test suites; None for experiments/test_WORLD.yaml. Runs of a
            name that studies share need the same.
        labs: Words of further `opd lab build`, by the folder in lab/.
    """

    name: str
    world: str
    page: str
    runs: dict[str, Run]
    seeds: int = 5
    claims: dict[str, Claim] = field(default_factory=dict)
    suites: str | None = None
    labs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def test(self) -> str:
        """Configuration whose test suites measure every student."""
        return self.suites or f"experiments/test_{self.world}.yaml"

    def settings(self, name: str) -> str:
        """Return a digest of a run's options, its configurations, and what it reads: other runs,
        and labs besides the world's.
        """
        run = self.runs[name]
        read = [file for file in (run.config, None if run.measure else self.test) if file]
        values = [_configuration(file) for file in read]
        own = json.dumps(asdict(run))
        labs = [words for lab, words in self.labs.items() if f"lab/{lab}/" in own]
        parts = [asdict(run), values, [self.settings(other) for other in run.after], *labs]
        whole = json.dumps(parts)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def __post_init__(self) -> None:
        before: set[str] = set()
        for name, run in self.runs.items():
            if missing := [other for other in run.after if other not in before]:
                raise UserError(f"{self.name}: run {name}: after: no earlier run is {missing[0]}")
            if (run.config, run.student, run.measure).count(None) != 2:
                raise UserError(f"{self.name}: run {name}: give one of config, student, measure")
            before.add(name)
        for name, claim in self.claims.items():
            if missing := [run for run in (claim.run, claim.than) if run not in self.runs]:
                raise UserError(f"{self.name}: claim {name}: no run is {missing[0]}")


@cache
def _configuration(file: str) -> Any:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class _Written(Study):
    """A study as in its file."""

    runs: dict[str, Run | Chain]  # type: ignore[assignment]


def read_study(name: str) -> Study:
    """Read experiments/NAME/study.yaml."""
    file = ROOT / "experiments" / name / "study.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--study", type=_Written)
    try:
        found = parser.parse_object({"study": values | {"name": name}}).as_dict()["study"]
    except ArgumentError as error:
        raise UserError(f"experiments/{name}/study.yaml: {error}") from error
    # Not instantiated by the parser, which would make the classes that options name.
    runs: dict[str, Run] = {}
    for label, fields in found.pop("runs").items():
        runs |= Chain(**fields).runs(label) if "links" in fields else {label: Run(**fields)}
    claims = {claim: Claim(**fields) for claim, fields in found.pop("claims").items()}
    return Study(runs=runs, claims=claims, **found)
