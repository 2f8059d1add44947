"""A run that is killed again and again; shared by the test of it and `benchmarks/kills.py`."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests import processes
from tests.full_run import RUN, Place, place, resumed_at

AnyProcess = processes.Process | subprocess.Popen[bytes]
PHASES = ("start-up", "step", "saving", "validation")


@dataclass
class Tale:
    """What happened to a run."""

    kills: list[Place] = field(default_factory=list)
    cold: int = 0  # of the kills, those of a start by a shell's command
    half_written: int = 0  # checkpoints in the middle of which a kill fell
    redone: int = 0  # optimiser steps that were made again
    seconds: float = 0.0
    # Seconds to the first step, of the last start that got so far, for cold and warm ones.
    startup: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # lines of ours on stderr

    def by_phase(self) -> dict[str, int]:
        return dict(Counter(place.phase for place in self.kills))


def run_under_fire(
    folder: Path,
    command: list[str],
    *,
    kills: int,
    steps: int,
    random: Random,
    startup: Mapping[str, float] | None = None,
    cold: float = 0.0,
    ranks: int = 1,
) -> Tale:
    """Run the command, kill it `kills` times, starting it again each time, and let it end.

    Every kill aims at a phase, a few steps after where the run stands, so that about all steps
    are used up; where it fell is what the run had told last.

    Args:
        folder: To run in.
        command: Starts and restarts the run.
        kills: SIGKILLs to all processes of the run.
        steps: Of the whole run.
        random: Decides when.
        startup: Seconds in which kills during start-up fall, by kind of start.
        cold: Share of starts by a shell's command; the others are forked from a warm parent,
            which leaves the imports out.
        ranks: Processes of the run; a cold start is given one, which starts the others.
    """
    tale, began, reached = Tale(startup=dict(startup or {})), time.monotonic(), 0
    while True:
        aim = _aim(random, reached, steps, kills - len(tale.kills))
        for name in ("whereabouts", "whereabouts.resumed"):
            (folder / name).unlink(missing_ok=True)
        errors = folder / f"log-{len(tale.kills)}.txt"
        kind = "cold" if random.random() < cold else "warm"
        with started(folder, command, errors, ranks=ranks if kind == "warm" else 0) as running:
            fell = _fire(running, folder, aim, random, tale, kind)
        lines = errors.read_text(errors="replace").splitlines()
        tale.said += [line for line in lines if line.startswith("opd: ")]
        if (again := resumed_at(folder)) is not None:
            tale.redone += reached - again
            reached = again
        if fell is None:
            if any(process.returncode for process in running):
                raise RuntimeError("\n".join(lines[-30:]))
            tale.seconds = time.monotonic() - began
            return tale
        tale.cold += kind == "cold"
        tale.kills.append(fell)
        reached = max(reached, fell.step)
        tale.half_written += len(list((folder / RUN / "checkpoints").glob(".*.writing")))


def _aim(random: Random, reached: int, steps: int, left: int) -> Place | None:
    """Where the next of `left` kills should fall."""
    if not left:
        return None
    (phase,) = random.choices(PHASES, weights=(2, 4, 5, 2))
    ahead = random.randint(0, max(1, 2 * (steps - 2 - reached) // left))
    return Place(phase, min(reached + ahead, steps - 1))


def _fire(
    run: Sequence[AnyProcess],
    folder: Path,
    aim: Place | None,
    random: Random,
    tale: Tale,
    kind: str,
) -> Place | None:
    """Kill the processes where `aim` says; where it fell, or None if they ended by themselves."""
    began, running = time.monotonic(), False
    fuse = random.uniform(0, tale.startup.get(kind, 0.0))
    while any(process.poll() is None for process in run):
        here, seconds = place(folder), time.monotonic() - began
        if here.phase != "start-up" and not running:
            running, tale.startup[kind] = True, seconds
        if aim is not None and _hits(aim, here, seconds > fuse):
            time.sleep(random.uniform(0, 0.06 if aim.phase == "saving" else 0.15))
            for process in random.sample(run, len(run)):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            killed = [process.wait() == -signal.SIGKILL for process in run]
            return place(folder) if any(killed) else None
        time.sleep(0.0005 if aim else 0.01)
    return None


def _hits(aim: Place, here: Place, fuse_is_over: bool) -> bool:
    if aim.phase == "start-up":
        return fuse_is_over
    # Where the phase does not come for a while, any will do: the run would end meanwhile.
    return here.step >= aim.step and (here.phase == aim.phase or here.step > aim.step + 4)


@contextmanager
def started(
    folder: Path, command: list[str], errors: Path, *, ranks: int = 0
) -> Iterator[Sequence[AnyProcess]]:
    """The command's processes, in process groups of their own, with all of which they end.

    Args:
        ranks: Processes to fork from a warm parent; 0 for a cold start of one.
    """
    with errors.open("wb") as log:
        options: dict[str, Any] = {
            "cwd": folder, "stdout": log, "stderr": log, "start_new_session": True,
        }  # fmt: skip
        running: Sequence[AnyProcess]
        if ranks:
            python, dash_m, module, *words = command
            assert (python, dash_m) == (sys.executable, "-m")
            running = processes.ranks(module, *words, count=ranks, **options)
        else:
            running = [subprocess.Popen(command, **options)]
        try:
            yield running
        finally:
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
