"""Run the program on mutated inputs: `python -m tests.fuzz [KIND ...]`.

An input is a function of seed, kind and number: `--only KIND:NUMBER` makes it again. What breaks a
rule is kept as a case, which the tests run from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.kinds import KINDS, Input, Kind, kind
from tests.fuzz.outcome import Outcome, broken

CASES = Path(__file__).parent / "cases"


@dataclass
class Tally:
    """Counts of one kind.

    Attributes:
        rules: Inputs by the rule that they break.
    """

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome, rule: str | None) -> None:
        self.inputs += 1
        self.accepted += outcome.accepted
        self.seconds += outcome.seconds
        self.slowest = max(self.slowest, outcome.seconds)
        if rule:
            self.rules[rule] += 1

    def row(self, name: str) -> str:
        """Return a row of the table below `HEAD`."""
        rules = ", ".join(f"{count} {rule}" for rule, count in self.rules.most_common()) or "none"
        refused = self.inputs - self.accepted
        mean = self.seconds / max(1, self.inputs)
        return (
            f"| {name} | {self.inputs:,} | {self.accepted:,} | {refused:,} | {rules} "
            f"| {mean:.2f} | {self.slowest:.1f} |"
        )


HEAD = (
    "| kind | inputs | accepted | refused | rules broken | CPU s each | slowest, s |\n"
    "|---|---|---|---|---|---|---|"
)


class Fuzzer:
    """Runs inputs of one kind, each in a folder of its own that is removed afterwards."""

    def __init__(self, name: str) -> None:
        self.kind: Kind = kind(name)
        self._workspace = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._root = Path(self._workspace.name)
        self.base = self._root / "base"
        self.base.mkdir()
        self.kind.prepare(self.base)

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kind.close()
        self._workspace.cleanup()

    def make(self, seed: int, number: int) -> Input:
        coordinates = f"{seed}:{self.kind.name}:{number}"
        return self.kind.make(Random(coordinates), self.base)

    def run(self, given: Input) -> tuple[Outcome, tuple[str, str] | None]:
        """Return what the program did, and the rule that it breaks."""
        # Two levels, so that a path upwards from the folder is seen.
        folder = self._root / "input" / "here"
        folder.mkdir(parents=True)
        try:
            outcome = self.kind.run(given, self.base, folder)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
        return outcome, broken(outcome)


def cases(name: str, folder: Path = CASES) -> Iterator[tuple[str, Input]]:
    """Yield the kept cases of a kind, by name."""
    for path in sorted((folder / name).glob("*.json")):
        yield path.stem, Input.from_json(path.read_text())


def keep(folder: Path, name: str, given: Input, rule: str) -> Path:
    """Write a case to the folder of its kind; return its file."""
    text = given.to_json()
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = folder / name / f"{rule}-{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def fuzz(
    fuzzer: Fuzzer,
    *,
    seed: int = 0,
    seconds: float | None = None,
    inputs: int | None = None,
    numbers: Sequence[int] | None = None,
    folder: Path | None = None,
    loud: bool = False,
) -> Tally:
    """Run inputs of a kind until time or number is reached.

    Args:
        fuzzer: Of the kind.
        seed: Decides all inputs.
        seconds: Begin no further input after this time; None for no end.
        inputs: The number of inputs; None for no end.
        numbers: Exactly these inputs instead.
        folder: Where inputs that break a rule are kept; None keeps none.
        loud: Whether every outcome is printed.
    """
    tally, name = Tally(), fuzzer.kind.name
    until = time.monotonic() + seconds if seconds else None
    number = 0
    while inputs is None or number < inputs:
        if until and time.monotonic() > until:
            break
        if numbers is not None and number >= len(numbers):
            break
        place = number if numbers is None else numbers[number]
        number += 1
        given = fuzzer.make(seed, place)
        outcome, found = fuzzer.run(given)
        tally.add(outcome, found[0] if found else None)
        if loud:
            said = [*outcome.err, *(outcome.out if outcome.accepted else ())]
            print(f"{name}:{place} {given.what}\n  exit {outcome.code}: " + "\n  ".join(said))
        if found:
            rule, why = found
            print(f"{name}:{place} {rule}: {given.what}: {why}", flush=True)
            if folder:
                keep(folder, name, given, rule)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="for each kind")
    parser.add_argument("--inputs", type=int, help="for each kind")
    parser.add_argument("--keep", type=Path, default=CASES, help="folder of kept cases")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one input again, in full")
    parser.add_argument("--loud", action="store_true", help="print what every input led to")
    given = parser.parse_args()
    chosen = given.kinds or [*KINDS]
    numbers = None
    if given.only:
        name, _, number = given.only.partition(":")
        chosen, numbers = [name], [int(number)]
    if unknown := [name for name in chosen if name not in KINDS]:
        parser.error(f"got the kind {unknown[0]!r}, expected {', '.join(KINDS)}")
    if numbers is None and given.seconds is None and given.inputs is None:
        given.seconds = 60.0
    rows, failed = [], False
    for name in chosen:
        with Fuzzer(name) as fuzzer:
            tally = fuzz(
                fuzzer,
                seed=given.seed,
                seconds=given.seconds,
                inputs=given.inputs,
                numbers=numbers,
                folder=None if numbers else given.keep,
                loud=given.loud or numbers is not None,
            )
        rows.append(tally.row(name))
        failed |= bool(tally.rules)
    print(HEAD, *rows, sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
