"""A call that hangs ends the process, in an orderly way if there is one."""

import time
from pathlib import Path

import pytest
import torch

from opd_lightning.rollouts.time_limit import TimeLimit
from tests import processes


def run(*command: str, cwd: Path | None = None) -> tuple[int, list[str], float]:
    """Exit code, lines of stderr and seconds of a program."""
    began = time.monotonic()
    done = processes.run(*command, cwd=cwd, timeout=200)
    return done.returncode, done.stderr.splitlines(), time.monotonic() - began


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_engine_that_hangs_ends_the_run_at_its_last_step(
    staleness: int, untrained_lab: Path, tmp_path: Path
) -> None:
    """In the trainer's thread and in that of the rollouts ahead."""
    code, lines, _ = run(
        "tests.integration.hanging", str(tmp_path), str(staleness), cwd=untrained_lab
    )
    assert code == 1, lines
    (line,) = [line for line in lines if line.startswith("opd: error")]
    call = "rank 0, step 2: HangingEngine.generate of 8 responses"
    assert line.startswith(f"opd: error: {call} has not returned for 3 s")
    assert "data.engine_time_limit" in line
    assert any("hanging.py" in line and "in generate" in line for line in lines)  # the stack
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("way", ["busy", "deaf", pytest.param("stubborn", marks=pytest.mark.slow)])
def test_whatever_the_main_thread_does(way: str) -> None:
    code, lines, seconds = run("tests.integration.stuck", way)
    assert code == 1
    assert seconds < 60
    assert any(line.endswith(f"in {way}") for line in lines), lines
    said = [line for line in lines if line.startswith("opd: error: rank 3, step 4: the call has")]
    assert len(said) == (0 if way == "deaf" else 1)
    assert ("interrupted" in lines) == (way != "deaf")


def test_a_call_in_time_is_left_alone() -> None:
    for seconds in (None, 0, 0.2):
        with TimeLimit(seconds).of("a short call"):
            time.sleep(0.05)
        time.sleep(0.5 if seconds else 0)
