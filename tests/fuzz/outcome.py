"""What a program did with an input, and the rule that it broke, if any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ERROR = "opd: error: "
LONGEST = 400  # characters of an error without `ERROR`
# The first word of a line of ours beside the error: notes, and warnings by the name of their kind.
OURS = ("opd: ", "warning: ")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        code: Exit code, negative for a signal.
        out: Lines of standard output.
        err: Lines of standard error.
        seconds: CPU seconds, or seconds of the wall for programs that mostly wait.
        late: Whether it was ended because it passed its limit.
        touched: Files that were made, changed or removed outside the folder of the run.
        places: What a refusal may name: one of these has to be in the line; empty: anything.
        ignored: What was accepted without being used, in words; empty if nothing was.
    """

    code: int
    out: Sequence[str] = ()
    err: Sequence[str] = ()
    seconds: float = 0.0
    late: bool = False
    touched: Sequence[str] = ()
    places: Sequence[str] = ()
    ignored: str = field(default="")

    @property
    def errors(self) -> list[str]:
        """Lines that refuse something, without their beginning."""
        return [line.removeprefix(ERROR) for line in self.err if line.startswith(ERROR)]

    @property
    def accepted(self) -> bool:
        return self.code == 0


def broken(outcome: Outcome) -> tuple[str, str] | None:
    """Return the rule that an outcome breaks, and how; None if it breaks none.

    The rules: hang, killed, traceback, touched, ignored, code, lines, long, unnamed.
    """
    told = [*outcome.err, *outcome.out]
    if outcome.late:
        return "hang", f"still running after {outcome.seconds:.1f} s"
    if any(line.startswith("Traceback (most recent call last)") for line in told):
        return "traceback", _last(outcome.err)
    if outcome.code < 0:
        return "killed", f"by signal {-outcome.code}; {_last(outcome.err)}"
    if outcome.touched:
        return "touched", ", ".join(outcome.touched)[:200]
    errors = outcome.errors
    if outcome.accepted:
        if errors:
            return "lines", f"an error, but exit code 0: {errors[0][:200]}"
        return ("ignored", outcome.ignored) if outcome.ignored else None
    if outcome.code not in (1, 2):
        return "code", f"{outcome.code}; {_last(outcome.err)}"
    if len(errors) != 1:
        return "lines", f"{len(errors)} errors; {_last(outcome.err)}"
    (line,) = errors
    if len(line) > LONGEST:
        return "long", f"{len(line)} characters: {line[:200]}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line):
        return "lines", f"control characters: {line[:200]!r}"
    if outcome.places and not any(place in line for place in outcome.places):
        return "unnamed", f"none of {', '.join(outcome.places)[:150]} in: {line}"
    return None


def _last(lines: Sequence[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")[:300]


Files = dict[str, tuple[int, int]]


def files(folder: Path) -> Files:
    """Return size and time of change (ns) of all files and folders below a folder."""
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        # A folder changes with its files, which are listed themselves.
        found[str(path.relative_to(folder))] = (
            (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
        )
    return found


def touched(before: Files, after: Files, allowed: Sequence[str]) -> list[str]:
    """Return the names that differ, except those in the allowed folders."""
    differ = (name for name in before | after if before.get(name) != after.get(name))
    return sorted(name for name in differ if not any(_inside(name, one) for one in allowed))


def _inside(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")
