"""Script `checkpoint_ranks.py PHASE FOLDER WAYS`: saves and resumes runs in the untrained lab.

Phases follow one another, each with another number of processes than the one before: `start` has
one, `middle` two, `end` one. Every process writes its observations to `FOLDER/PHASE-RANK.json`.

Ways, with commas between them: `ddp`; `file` and `folder`, FSDP2 with gathered files and with
folders of shards.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.checkpoints import save_last
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import CheckpointError, UserError
from opd_lightning.methods import OPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from tests.integration.test_interrupted import Losses
from tests.toy_run import Toy, train
from tests.unit.test_checkpoints import flip


def strategy(way: str) -> dict[str, Any]:
    """Return trainer arguments for two processes."""
    folder = way == "folder"
    sharded = ModelParallelStrategy(2, 1, save_distributed_checkpoint=folder)
    return {"devices": 2, "strategy": "ddp" if way == "ddp" else sharded}


def complaint(act: Callable[[], Any]) -> str:
    try:
        act()
    except (CheckpointError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def full_disk(trainer: Any, folder: Path, rank: int) -> tuple[str, list[str]]:
    """Return error and remaining files if one process cannot write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.global_rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    said = complaint(lambda: save_last(trainer))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    return said, sorted(path.name for path in folder.iterdir())


def faults(folder: Path, way: str) -> dict[str, Any]:
    """Run two processes with failing disks; return the observations."""
    all_steps = {"save_top_k": -1}
    trainer, first = train(folder, 2, saver=all_steps, **strategy(way))
    full = [full_disk(trainer, folder, rank) for rank in (0, 1)]
    _, second = train(folder, 3, saver=all_steps, **strategy(way))
    dist.barrier()
    if dist.get_rank() == 0:  # in a file that rank 1 checks
        newest = [folder / "last.ckpt", folder / "step=3.ckpt"]
        for path in newest:
            flip(path / "__1_0.distcp" if path.is_dir() else path)
    dist.barrier()
    _, third = train(folder, 4, saver=all_steps, **strategy(way))
    wide = Toy(width=16)
    other = complaint(lambda: train(folder, 5, module=wide, **strategy(way)))
    return {
        "full": full,
        "losses": [module.losses for module in (first, second, third)],
        "another model": other,
    }


def distil(folder: Path, steps: int, **trainer_args: Any) -> list[float]:
    """Train from the newest checkpoint; return the losses."""
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_last=True), losses],
        log_every_n_steps=1,
        **{"devices": 1, **trainer_args},
    )
    method = OPD(
        Student("lab/arithmetic/student"),
        FrozenTeacher("lab/arithmetic/teacher"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=HFEngine(),
        sampling=Sampling(max_new_tokens=12),
        prompts_per_step=4,
    )
    # Sharded gradients cannot be looked at one by one.
    losses.on_before_optimizer_step = lambda *_: None  # type: ignore[method-assign]
    trainer.fit(method, datamodule=data, ckpt_path="last")
    return list(losses.of_step.values())


def main(phase: str, folder: Path, ways: list[str]) -> None:
    warnings.filterwarnings("ignore")
    seen: dict[str, Any] = {}
    whole = [way for way in ways if way != "folder"]  # what one process can go on from
    if phase == "start":
        seen["unbroken"] = distil(folder / "unbroken", 6)
        seen |= {way: distil(folder / way, 2) for way in whole}
    elif phase == "middle":
        seen["faults"] = {way: faults(folder / "toy" / way, way) for way in ways}
        seen |= {way: distil(folder / way, 4, **strategy(way)) for way in whole}
    else:
        if "folder" in ways:
            shards = folder / "toy" / "folder" / "last.ckpt"
            seen["shards"] = complaint(lambda: train(folder / "toy", 6, ckpt_path=shards))
        seen |= {way: distil(folder / way, 6) for way in whole}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"{phase}-{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():  # gloo may abort a process that exits first
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
