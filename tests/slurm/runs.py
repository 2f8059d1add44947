"""Short training runs as batch jobs, and their comparison."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import yaml

from tests.processes import run_ranks
from tests.slurm.cluster import Job
from tests.slurm.scripts import User

STEPS = 6
LAST = "run/checkpoints/last.ckpt"
ONE = "one process"  # in place of a strategy


def nodes_of(strategy: str) -> int:
    """Return the number of nodes, with a process each."""
    return 1 if strategy == ONE else 2


def files_of(strategy: str) -> list[str]:
    overlays = [] if strategy == ONE else [f"configs/strategy/{strategy}.yaml"]
    return ["configs/lab/opd.yaml", *overlays, "changes.yaml"]


def submit(
    user: User,
    strategy: str,
    *options: str,
    pause: dict[str, Any] | None = None,
    engine: str = "HFEngine",
) -> Job:
    """Submit a run whose method draws from the global generators.

    Args:
        user: User whose folder it runs in.
        strategy: Name of a file in configs/strategy, for two nodes; or `ONE`.
        options: Further options of sbatch.
        pause: Arguments of a `Pause`.
        engine: Class of the engine.
    """
    write_changes(user, engine, pause)
    # One node, so that a requeued job goes back to it.
    nodes = ("--nodelist=n1",) if strategy == ONE else (f"--nodes={nodes_of(strategy)}",)
    options = (*nodes, *options)
    config = " ".join(files_of(strategy))
    return user.submit("train.sbatch", sbatch=options, CONFIG=config, RUN="run")


def run_here(user: User, strategy: str, *, engine: str = "HFEngine") -> None:
    """Run the same without SLURM."""
    write_changes(user, engine, None)
    count = nodes_of(strategy)
    words = [word for file in files_of(strategy) for word in ("--config", file)]
    words += ["--trainer.callbacks+=callbacks.RngState", f"--trainer.devices={count}"]
    words += ["--trainer.logger.init_args.save_dir", "run"]
    run_ranks("opd_lightning", "fit", *words, count=count, timeout=300, cwd=user.folder)


def write_changes(user: User, engine: str, pause: dict[str, Any] | None) -> None:
    saver = {"every_n_train_steps": 2, "save_last": True, "save_top_k": 1}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver}
    ]
    if pause:
        callbacks.insert(0, {"class_path": "tests.slurm.parts.Pause", "init_args": pause})
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
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 4,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
    }
    (user.folder / "changes.yaml").write_text(yaml.safe_dump(changes))


def assert_alike(user: User, other: User) -> None:
    """Assert that two runs ended with identical weights, optimiser and random states."""
    mine, theirs = (torch.load(u.folder / LAST, weights_only=True) for u in (user, other))
    assert mine["global_step"] == theirs["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng_states"):
        assert hashed(mine[part]) == hashed(theirs[part]), part


def hashed(value: Any) -> Any:
    """Return a value with tensors replaced by hashes of their bytes."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: hashed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hashed(part) for part in value]
    return value
