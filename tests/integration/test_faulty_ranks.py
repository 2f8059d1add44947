"""Two processes, one of which has a fault: they decide alike, or both end."""

import time
from pathlib import Path

import pytest
import torch

from tests import processes

SCRIPT = "tests.integration.faulty_ranks"


def run(folder: Path, strategy: str, fault: str, file: Path) -> tuple[int, list[str]]:
    """Exit code and lines of stderr of two ranks."""
    words = (strategy, fault, str(file))
    done = processes.run_ranks(SCRIPT, *words, count=2, cwd=folder, timeout=280, check=False)
    return done[0].returncode, [line for one in done for line in one.stderr.splitlines()]


def launch(folder: Path, strategy: str, fault: str, file: Path) -> tuple[int, list[str], float]:
    """The same by Lightning's launcher, which watches the second rank; and the clock at the end."""
    done = processes.run(SCRIPT, strategy, fault, str(file), cwd=folder, timeout=280)
    return done.returncode, done.stderr.splitlines(), time.time()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_nan_on_one_rank_skips_the_step_on_all(
    strategy: str, untrained_lab: Path, tmp_path: Path
) -> None:
    code, lines = run(untrained_lab, strategy, "nan", tmp_path / "seen")
    assert code == 0, lines
    assert len([line for line in lines if line.startswith("opd: step 1 skipped: ")]) == 1
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"seen{rank}", weights_only=True)
        assert seen == {"moved": {0: True, 1: False, 2: True}, "skipped": 1.0}


@pytest.mark.slow
def test_too_many_skips_are_told_once(untrained_lab: Path, tmp_path: Path) -> None:
    code, lines = run(untrained_lab, "ddp", "nan for good", tmp_path / "seen")
    assert code == 1, lines
    (line,) = [line for line in lines if line.startswith("opd: error: ")]
    assert "step 2: " in line
    assert "that makes 2 in a row" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["killed", pytest.param("killed while the other writes", marks=pytest.mark.slow)]
)
def test_a_killed_rank_ends_the_run_soon(fault: str, untrained_lab: Path, tmp_path: Path) -> None:
    """By the broken connection, or by Lightning's launcher, which looks every 5 seconds."""
    code, lines, ended = launch(untrained_lab, "ddp", fault, tmp_path / "seen")
    (killed,) = [line for line in lines if line.startswith("killed at ")]
    assert ended - float(killed.split()[-1]) < 120  # on a machine that is busy otherwise
    said = [line for line in lines if "opd: error: rank 0: another process of the run is" in line]
    if fault == "killed" and code == 1:
        assert len(said) == 1
    else:
        assert code == -9  # the launcher's
        assert any("terminated with code -9" in line for line in lines)
    saved = torch.load(tmp_path / "seen-checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


@pytest.mark.slow
def test_an_engine_that_hangs_on_one_rank_ends_both(untrained_lab: Path, tmp_path: Path) -> None:
    code, lines, _ = launch(untrained_lab, "ddp", "hangs", tmp_path / "seen")
    assert code in (1, -9)
    said = [
        line for line in lines if line.startswith("opd: error: rank 1, step 1: Engine.generate")
    ]
    assert len(said) == 1
