"""Two processes (DDP over gloo) with two micro-batches each equal one process with one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(folder: Path, ranks: int, micro_batches: int, file: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(ranks), str(micro_batches), str(file)]
    subprocess.run(command, cwd=folder, check=True, timeout=240)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


def test_u5_two_ranks_are_one(untrained_lab: Path, tmp_path: Path) -> None:
    one = run(untrained_lab, 1, 1, tmp_path / "one.pt")
    two = run(untrained_lab, 2, 2, tmp_path / "two.pt")
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    for alone, together in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
        assert max(g.abs().max() for g in alone.values()) > 1e-3
    timing = ("time/", "cost/", "tokens_per_second")
    names = [n for n in one["logged"] if not n.startswith(timing)]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(
            torch.tensor(two["logged"][name]),
            torch.tensor(one["logged"][name]),
            atol=1e-4,
            rtol=1e-4,
        )
