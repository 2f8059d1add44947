"""Real servers on loopback: `opd serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests import forked_server
from tests.processes import Process

# Less than a test's time limit, so that a server that hangs is told with its log, or a request that
# it does not answer with its path: half a minute on a free core, and a second.
START_SECONDS = 200
WAITS: dict[str, Any] = {"patience": 20.0, "timeout": 60.0}


class RunningServer:
    """An `opd serve` of `model`; its files are in `folder`, where servers share a key.

    Started as a user starts it, or forked from a process that has imported PyTorch and vLLM, and
    read the environment, before; see `tests/forked_server.py`.
    """

    def __init__(
        self, model: Path, folder: Path, *options: str, name: str = "server", warm: bool = False
    ) -> None:
        self._warm = warm
        self.key_file = folder / "key"
        self.address_file = folder / f"{name}.address"
        self.log = folder / f"{name}.log"
        words = ["serve", "--model", str(model), "--key_file", str(self.key_file)]
        self._words = [*words, "--address_file", str(self.address_file), *options]
        self._start()

    def _start(self, *options: str) -> None:
        words = [*self._words, *options]
        with self.log.open("w") as log:
            self.process: Process | subprocess.Popen[bytes]
            if self._warm:
                parent = forked_server.parent()
                self.process = parent.fork("tests.forked_server", *words, stdout=log, stderr=log)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "opd_lightning", *words], stdout=log, stderr=log
                )

    @property
    def url(self) -> str:
        return self.address_file.read_text().strip()

    @property
    def key(self) -> str:
        return self.key_file.read_text().strip()

    def wait(self) -> RunningServer:
        """Until it answers."""
        until = time.monotonic() + START_SECONDS
        while not self.address_file.is_file():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)
        self._port = self.url.rpartition(":")[2]
        return self

    def is_running(self) -> bool:
        return self.process.poll() is None

    def restart(self, *, elsewhere: bool = False) -> RunningServer:
        """After it has ended, on the port that it had, or on another."""
        self.address_file.unlink(missing_ok=True)  # `kill` leaves it
        self._start(*([] if elsewhere else ["--port", self._port]))
        return self

    def children(self) -> list[int]:
        """Processes that it started, and theirs."""
        found, parents = [], {self.process.pid}
        while parents:
            parents = {pid for pid in _processes() if _parent(pid) in parents}
            found += sorted(parents)
        return found

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """No chance to tidy up, as when a machine goes down."""
        doomed = [*self.children(), self.process.pid]
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait(timeout=60)
        until = time.monotonic() + 60
        while any(map(is_running, doomed)):  # they hold the port that a restart listens on
            assert time.monotonic() < until, doomed
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for what has ended, also if its parent has not taken notice."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        # The name, which may hold anything, is in brackets; the state and the parent follow.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
