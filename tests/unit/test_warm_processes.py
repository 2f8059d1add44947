"""Processes forked from the warm parent are like those that a shell starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Process, run, run_ranks

PROGRAM = """
import atexit, os, signal, sys, threading
atexit.register(print, "exit handlers run")
print(sys.argv[1:], os.getcwd(), sorted(os.environ), sys.path[0], sys.stdin.read())
print(threading.active_count(), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print(os.getsid(0) == os.getpid(), __name__, sys.modules["__main__"].__spec__.name)
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), file=sys.stderr)
if sys.argv[1] == "waits":
    signal.pause()
if sys.argv[1] == "fails":
    raise ValueError
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the program as a module."""
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("way", ["0", "3", "fails"])
def test_it_is_like_a_real_start(folder: Path, way: str) -> None:
    environment = {"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8"}
    warm = run("program", way, cwd=folder, env=environment, timeout=200)
    real = subprocess.run(
        [sys.executable, "-m", "program", way],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (warm.returncode, warm.stdout) == (real.returncode, real.stdout)
    assert warm.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_can_be_killed_with_its_group(folder: Path, number: signal.Signals) -> None:
    process = Process("program", "waits", cwd=folder, start_new_session=True)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    os.killpg(process.pid, number)
    process.communicate(60)
    assert process.returncode == -number


def test_the_first_rank_that_fails_is_told(folder: Path) -> None:
    done = run_ranks("program", "0", count=2, cwd=folder, timeout=100)
    assert [one.stderr for one in done] == ["rank 0 of 2\n", "rank 1 of 2\n"]
    with pytest.raises(AssertionError, match="exit code 3\nrank 1 of 2"):
        run_ranks("program", "3", count=2, cwd=folder, timeout=100)
