"""Run the studies in this folder, and print their tables.

python -m experiments run merging [--seeds 0 1 2] [--only "merged-*"]    # what is missing
python -m experiments status merging
python -m experiments table merging [--write]                           # on record, and into docs/

A run that was killed goes on where it stopped, when the command is given again. Several of these
commands share the work, also in several terminals.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.records import comparable
from experiments.results import read_results, status, tables, write
from experiments.study import STUDIES, Study, read_study
from experiments.work import run_missing

WORK = Path("runs/experiments")


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run one of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("run", "status", "table"))
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="the study's, if not given")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the runs' names")
    parser.add_argument("--work", type=Path, default=WORK, help=f"default: {WORK}")
    parser.add_argument(
        "--write", action="store_true", help="put the scores on record and the tables into docs/"
    )
    given = parser.parse_args(words)
    study: Study = read_study(given.study)
    seeds = given.seeds or list(range(study.seeds))
    work = given.work.resolve() / study.world
    if given.command == "run":
        sys.exit(run_missing(study, seeds, given.only, work))
    found = read_results(study, seeds, work)
    if given.command == "status":
        print(status(study, comparable(study, found), seeds))
    elif given.write:
        write(study, found)
    else:
        print(tables(study, comparable(study, found)))


if __name__ == "__main__":
    main()
