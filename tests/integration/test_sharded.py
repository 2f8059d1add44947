"""FSDP2 over gloo: two processes with half of every model each equal one with the whole."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from opd_lightning.errors import UserError
from opd_lightning.export import load_student
from opd_lightning.sharding import Sharding, check_strategy
from opd_lightning.student import Student
from tests.conftest import build_tiny_model

SCRIPT = Path(__file__).with_name("sharded.py")
CONFIGS = Path(__file__).parents[2] / "configs"
EXACT = (
    "sampled",
    "divergence",
    "moving",
    "bare",
    "adapters",
    "domains",
    "dropped",
)

Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs leave what they recorded, and their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "lab").symlink_to(untrained_lab / "lab")
    build_tiny_model(folder / "untied", hidden_size=64, layers=2, seed=0, tie=False)
    for ranks in (1, 2):
        command = [sys.executable, str(SCRIPT), str(ranks), f"{ranks}.pt"]
        subprocess.run(command, cwd=folder, check=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Runs]:
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


@pytest.mark.parametrize("way", ["bfloat16", "bfloat16 adapters"])
def test_layers_are_gathered_in_bfloat16_under_autocast(runs: list[Runs], way: str) -> None:
    """Not to the bit: norms' weights are rounded too, and what a bare base is read with."""
    one, two = (found[way] for found in runs)
    for alone, together in zip(one["logged"], two["logged"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-2)
    largest = max(g.abs().max() for g in one["gradients"][0].values())
    for name, gradient in one["gradients"][0].items():
        torch.testing.assert_close(
            two["gradients"][0][name], gradient, atol=2e-2 * float(largest), rtol=0
        )
    assert two["weights"][0]["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", [False, True], ids=["file", "folder"])
def test_resume_continues_bit_for_bit_with_an_ema_teacher(runs: list[Runs], kind: bool) -> None:
    unbroken, second = runs[1]["unbroken"], runs[1][f"continued {kind}"]["second"]
    assert len(unbroken["gradients"]) == 4
    torch.testing.assert_close(second["gradients"], unbroken["gradients"][2:], atol=0, rtol=0)
    torch.testing.assert_close(second["weights"][1], unbroken["weights"][1], atol=0, rtol=0)


@pytest.mark.parametrize("kind", [False, True], ids=["file", "folder"])
def test_a_checkpoint_of_shards_is_exported(folder: Path, runs: list[Runs], kind: bool) -> None:
    student = Student(str(folder / "lab" / "arithmetic" / "student"))
    assert load_student(student, str(folder / f"checkpoint-{kind}")) == 2
    expected = runs[1][f"continued {kind}"]["first"]["weights"][1]
    torch.testing.assert_close(dict(student.weights()), expected, atol=0, rtol=0)


def test_shards_of_another_student_are_refused(folder: Path) -> None:
    student = Student(str(folder / "lab" / "arithmetic" / "teacher"))
    with pytest.raises(UserError, match="is not of the student in this config"):
        load_student(student, str(folder / "checkpoint-True"))
    with pytest.raises(UserError, match=r"is damaged or no checkpoint: .* is missing"):
        load_student(student, str(folder))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "got FSDPStrategy, expected ddp, or ModelParallelStrategy"),
        (ModelParallelStrategy(), "got data_parallel_size 1 and tensor_parallel_size 2"),
        (ModelParallelStrategy(4, 1), "got data_parallel_size 4 and tensor_parallel_size 1"),
    ],
    ids=["fsdp1", "auto", "count"],
)
def test_strategies_that_are_refused(strategy: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_strategy(strategy, devices=2, nodes=1)
    check_strategy(ModelParallelStrategy(2, 1), devices=2, nodes=1)


def test_a_model_without_named_layers_is_refused() -> None:
    sharding = Sharding(mesh=cast(DeviceMesh, None), device=torch.device("cpu"))
    with pytest.raises(UserError, match="does not name its layers"):
        sharding.spread(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_the_overlay_trains_validates_and_exports(folder: Path) -> None:
    run = "runs/fsdp2"
    overlay = ("lab/opd.yaml", "strategy/fsdp2.yaml")
    configs = [word for name in overlay for word in ("--config", str(CONFIGS / name))]
    shorter = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={run}",
        "--trainer.enable_progress_bar=false",
        "--data.prompts_per_step=8",
        "--data.sampling.max_new_tokens=10",
    ]
    saved = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    for command in (
        ["fit", *configs, *shorter],
        ["validate", *saved],
        ["export", *saved, "--out", "student"],
    ):
        subprocess.run(
            [sys.executable, "-m", "opd_lightning", *command], cwd=folder, check=True, timeout=120
        )
    assert (folder / "student" / "model.safetensors").is_file()
