"""A run that is killed again and again; shared by the test of it and `benchmarks/kills.py`."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.full_run import RUN, Place, place, resumed_at
from tests.processes import Process

AnyProcess = Process | subprocess.Popen[bytes]
PHASES = ("start-up", "step", "saving", "validation")


@dataclass
class Tale:
    """What happened to a run."""

    kills: list[Place] = field(default_factory=list)
    half_written: int = 0  # checkpoints in the middle of which a kill fell
    redone: int = 0  # optimiser steps that were made again
    seconds: float = 0.0
    startup: float = 0.0  # seconds to the first step, of the last start that got so far
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
    startup: float = 0,
    warm: bool = False,
) -> Tale:
    """Run the command, kill it `kills` times, starting it again each time, and let it end.

    Every kill aims at a phase, a few steps after where the run stands, so that about all steps
    are used up; where it fell is what the run had told last.

    Args:
        folder: To run in.
        command: Starts and restarts the run.
        kills: SIGKILLs to the whole process group.
        steps: Of the whole run.
        random: Decides when.
        startup: Seconds in which kills during start-up fall.
        warm: Whether the command is forked from a warm parent, which leaves the imports out.
    """
    tale, began, reached = Tale(startup=startup), time.monotonic(), 0
    while True:
        aim = _aim(random, reached, steps, kills - len(tale.kills))
        for name in ("whereabouts", "whereabouts.resumed"):
            (folder / name).unlink(missing_ok=True)
        errors = folder / f"log-{len(tale.kills)}.txt"
        with started(folder, command, errors, warm=warm) as process:
            fell = _fire(process, folder, aim, random, tale)
        lines = errors.read_text(errors="replace").splitlines()
        tale.said += [line for line in lines if line.startswith("opd: ")]
        if (again := resumed_at(folder)) is not None:
            tale.redone += reached - again
            reached = again
        if fell is None:
            if process.returncode:
                raise RuntimeError("\n".join(lines[-30:]))
            tale.seconds = time.monotonic() - began
            return tale
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
    process: AnyProcess, folder: Path, aim: Place | None, random: Random, tale: Tale
) -> Place | None:
    """Kill the process where `aim` says; where it fell, or None if it ended by itself."""
    began, running = time.monotonic(), False
    fuse = random.uniform(0, tale.startup)
    while process.poll() is None:
        here, seconds = place(folder), time.monotonic() - began
        if here.phase != "start-up" and not running:
            running, tale.startup = True, seconds
        if aim is not None and _hits(aim, here, seconds > fuse):
            time.sleep(random.uniform(0, 0.06 if aim.phase == "saving" else 0.15))
            os.killpg(process.pid, signal.SIGKILL)
            return place(folder) if process.wait() == -signal.SIGKILL else None
        time.sleep(0.0005 if aim else 0.01)
    return None


def _hits(aim: Place, here: Place, fuse_is_over: bool) -> bool:
    if aim.phase == "start-up":
        return fuse_is_over
    # Where the phase does not come for a while, any will do: the run would end meanwhile.
    return here.step >= aim.step and (here.phase == aim.phase or here.step > aim.step + 4)


@contextmanager
def started(
    folder: Path, command: list[str], errors: Path, *, warm: bool = False
) -> Iterator[AnyProcess]:
    """The command in a process group of its own, with all of which it ends."""
    with errors.open("wb") as log:
        options: dict[str, Any] = {"cwd": folder, "stdout": log, "stderr": log}
        process: AnyProcess
        if warm:
            python, dash_m, module, *words = command
            assert (python, dash_m) == (sys.executable, "-m")
            process = Process(module, *words, start_new_session=True, **options)
        else:
            process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
