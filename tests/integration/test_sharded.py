"""FSDP2 over gloo: two processes with half of every model each equal one with the whole."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from opd_lightning.errors import UserError
from opd_lightning.sharding import check_strategy
from tests.conftest import build_tiny_model

SCRIPT = Path(__file__).with_name("sharded.py")
CONFIGS = Path(__file__).parents[2] / "configs"
EXACT = (
    "sampled",
    "divergence",
    "checkpointing",
    "moving",
    "bare",
    "adapters",
    "domains",
    "dropped",
)

Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "lab").symlink_to(untrained_lab / "lab")
    build_tiny_model(folder / "untied", hidden_size=64, layers=2, seed=0, tie=False)
    for ranks in (1, 2):
        command = [sys.executable, str(SCRIPT), str(ranks), f"{ranks}.pt"]
        subprocess.run(command, cwd=folder, check=True, timeout=240)
    return [torch.load(folder / f"{ranks}.pt", weights_only=True) for ranks in (1, 2)]


@pytest.mark.parametrize("way", EXACT)
def test_two_shards_are_one(runs: list[Runs], way: str) -> None:
    one, two = (found[way] for found in runs)
    assert one["held"] == 1
    assert two["held"] == pytest.approx(0.5, abs=0.01)
    assert len(one["gradients"]) == len(two["gradients"]) == 3
    torch.testing.assert_close(two["weights"][0], one["weights"][0], atol=0, rtol=0)
    for alone, together in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
        assert max(g.abs().max() for g in alone.values()) > 1e-2
    torch.testing.assert_close(two["weights"][1], one["weights"][1], atol=1e-6, rtol=0)
    truncated = min(logged["response/truncated"] for logged in one["logged"])
    assert truncated < 1, "responses must differ in length"
    for alone, together in zip(one["logged"], two["logged"], strict=True):
        assert together.keys() == alone.keys()
        timing = ("time/", "cost/", "tokens_per_second")
        same = {name: value for name, value in alone.items() if not name.startswith(timing)}
        assert {name: together[name] for name in same} == pytest.approx(same, abs=1e-5)


def test_a_micro_batch_without_tokens_takes_part(runs: list[Runs]) -> None:
    one, two = (found["dropped"] for found in runs)
    assert one["empty"] == 0
    assert two["empty"] > 0


def test_layers_are_gathered_in_bfloat16_under_autocast(runs: list[Runs]) -> None:
    """Not the same to the bit: norms' weights are rounded too, where autocast rounds matrices."""
    one, two = (found["bfloat16"] for found in runs)
    for alone, together in zip(one["logged"], two["logged"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-2)
    largest = max(g.abs().max() for g in one["gradients"][0].values())
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(
            two["gradients"][0][name], gradient, atol=1e-2 * float(largest), rtol=0
        )
    assert two["weights"][0]["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_resume_continues_bit_for_bit_with_an_ema_teacher(runs: list[Runs], folder: bool) -> None:
    found = runs[1][f"continued {folder}"]
    one, again = found["one"], found["again"]
    assert len(one["gradients"]) == 4
    torch.testing.assert_close(again["gradients"], one["gradients"][2:], atol=0, rtol=0)
    torch.testing.assert_close(again["weights"][1], one["weights"][1], atol=0, rtol=0)


def test_other_strategies_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer.strategy: got FSDPStrategy, expected ddp, or"):
        check_strategy(FSDPStrategy())
