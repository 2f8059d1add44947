"""Training runs as batch jobs: what a run is made of, and whether two ended alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.slurm.cluster import ROOT, Cluster, Job, until

STEPS = 6
LAST = "run/checkpoints/last.ckpt"

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output=log
srun opd fit --config {lab} --config changes.yaml --ckpt_path last
exit $?
"""

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp2": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": False,
        },
    },
}


def submit(
    cluster: Cluster,
    folder: Path,
    lab: Path,
    strategy: str,
    *options: str,
    pause: dict[str, Any] | None = None,
    engine: str = "HFEngine",
    callbacks: tuple[str, ...] = ("SlurmRequeue", "RngState"),
    **trainer: Any,
) -> Job:
    """Hand in a short run on the untrained lab, whose method draws from the global generators.

    Args:
        folder: Where it runs; made.
        lab: The untrained lab.
        options: Of sbatch.
        pause: Arguments of a `Pause` in its first start.
        trainer: Further settings.
    """
    folder.mkdir(parents=True)
    (folder / "lab").symlink_to(lab / "lab")
    listed: list[dict[str, Any]] = [{"class_path": f"callbacks.{name}"} for name in callbacks]
    saver = {"every_n_train_steps": 2, "save_last": True, "save_top_k": 1}
    listed.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver})
    if pause:
        listed.insert(0, {"class_path": "tests.slurm.parts.Pause", "init_args": pause})
    changes = {
        "model": {"class_path": "tests.slurm.parts.NoisyOPD"},
        "data": {
            "train": {"limit": 12},  # an epoch is three steps
            "engine": {"class_path": f"opd_lightning.rollouts.{engine}"},
            "validation": {"sums": {"prompts": {"limit": 8}, "batch_size": 2}},
            "sampling": {"max_new_tokens": 6},
            "prompts_per_step": 4,
        },
        "trainer": {
            "strategy": STRATEGIES[strategy],
            "num_nodes": 2,
            "devices": 1,
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 4,
            "enable_progress_bar": False,
            "logger": {"init_args": {"save_dir": "run"}},
            "callbacks": listed,
        }
        | trainer,
    }
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    script = folder / "job.sh"
    script.write_text(SCRIPT.format(lab=ROOT / "configs" / "lab" / "opd.yaml"))
    return cluster.submit(script, *options)


def wait_for_pause(folder: Path) -> list[str]:
    """Process ids of both ranks, once they stand at their `Pause`."""
    files = [folder / f"waits-{rank}" for rank in (0, 1)]
    until(lambda: all(f.exists() and f.read_text() for f in files), f"the pause of {folder}")
    return [file.read_text() for file in files]


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def assert_alike(folder: Path, other: Path) -> None:
    """Two runs ended with the same weights, optimiser and random states, to the bit."""
    mine, theirs = (torch.load(f / LAST, weights_only=True) for f in (folder, other))
    assert mine["global_step"] == theirs["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng_states"):
        assert hashed(mine[part]) == hashed(theirs[part]), part


def hashed(value: Any) -> Any:
    """Every tensor as a hash of its bytes, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: hashed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hashed(part) for part in value]
    return value
