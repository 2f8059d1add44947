"""Steps of several processes by turns: one of them runs a step while the others wait.

A side is a process that trains; it calls `Turns.start` before its first step and `Turns.end` after
each. The benchmark holds a `Side` for it. Both talk in lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a peer's environment need not have the project installed
    from opd_lightning.timing import StepTimer

ROOT = Path(__file__).parents[2]
PREFIX = "TURN "  # of lines that are for the benchmark; libraries print too
STEP, STOP = "step", "stop"


class Turns:
    """A side's end of the line."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")  # libraries may replace sys.stdout

    def start(self) -> None:
        """Wait for the first step's turn."""
        self._send({"ready": True})
        self._wait()

    def end(self, tokens: int, stages: Mapping[str, float] | None = None) -> bool:
        """Report a step, and wait for the next one's turn.

        Args:
            tokens: Response tokens of the step.
            stages: Seconds of its stages.

        Returns:
            Whether there is a next step.
        """
        wall, cpu = perf_counter() - self._began[0], process_time() - self._began[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"wall": wall, "cpu": cpu, "tokens": tokens, "peak": peak}
        self._send({**report, "stages": dict(stages or {})})
        return self._wait()

    def _send(self, report: Mapping[str, Any]) -> None:
        self._out.write(f"\n{PREFIX}{json.dumps(report)}\n")
        self._out.flush()

    def _wait(self) -> bool:
        word = sys.stdin.readline().strip()
        self._began = perf_counter(), process_time()
        return word == STEP


def stages_of(timer: StepTimer) -> dict[str, float]:
    """Return the seconds of the last step's stages."""
    return {k: s for k, s in timer.last.items() if k not in ("step", "overhead")}


class Side:
    """The benchmark's end of the line to a process that trains.

    Args:
        python: Interpreter with what the side needs.
        module: Run with `-m`, from the project's folder.
        arguments: Follow on the command line.
        environment: Variables added to this process's.
    """

    def __init__(
        self, python: str, module: str, *arguments: str, environment: Mapping[str, str]
    ) -> None:
        self._name = " ".join([module, *arguments])
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_until_ready(self) -> None:
        self._read()

    def step(self) -> dict[str, Any]:
        """Run one step; return its seconds, tokens and stages, and the process's peak in bytes."""
        self._write(STEP)
        return self._read()

    def stop(self) -> None:
        """End the process, in order where it answers."""
        if self._process.poll() is None:
            self._write(STOP)
            try:
                self._process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._log.close()

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
                return found
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self._name} ended:\n{self._log.read()[-3000:]}")
