"""Two processes (DDP over gloo) with two micro-batches each equal one process with one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(folder: Path, ranks: int, micro_batches: int, staleness: int, file: Path) -> dict[str, Any]:
    numbers = [str(n) for n in (ranks, micro_batches, staleness)]
    command = [sys.executable, str(SCRIPT), *numbers, str(file)]
    subprocess.run(command, cwd=folder, check=True, timeout=240)
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


@pytest.mark.parametrize("staleness", [0, 1])
def test_u5_two_ranks_are_one(staleness: int, untrained_lab: Path, tmp_path: Path) -> None:
    one = run(untrained_lab, 1, 1, staleness, tmp_path / "one.pt")
    two = run(untrained_lab, 2, 2, staleness, tmp_path / "two.pt")
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
    if staleness:  # the rollouts in flight are those of all ranks
        alone, together = (rollouts_of(tmp_path / f"{name}.pt.ckpt") for name in ("one", "two"))
        assert len(alone) == 4 * 3
        assert together == alone


def rollouts_of(checkpoint: Path) -> list[tuple[int, list[int], int]]:
    """Which prompt, what was written and by which weights."""
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    (stream,) = loops["state_dict"]["combined_loader"]
    return [(r["group"], r["response_ids"], r["policy_version"]) for r in stream["rollouts"]]
