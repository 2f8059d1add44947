"""Program `collapse_ranks RANKS HOW FILE`: trains in the untrained lab and steps back once.

HOW is ddp, or fsdp with its checkpoints in a file or a folder. Gradient descent with momentum, so
that a step back shows in weights and optimiser alike. Rank 0 writes its weights at the end, those
of all ranks, and how often the run stepped back.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.methods import OPD
from opd_lightning.models.sharding import full_tensor
from opd_lightning.models.student import Student
from opd_lightning.processes import gather
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from tests.integration.test_collapse import watch_all


def strategy_of(ranks: int, how: str) -> Strategy | str:
    if ranks == 1:
        return "auto"
    if how == "ddp":
        return how
    return ModelParallelStrategy(
        data_parallel_size=ranks,
        tensor_parallel_size=1,
        save_distributed_checkpoint=how == "folder",
    )


def main(ranks: int, how: str, file: Path) -> None:
    watch = watch_all()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy_of(ranks, how),
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, ModelCheckpoint(file.with_suffix(""), save_top_k=0)],
        log_every_n_steps=1,
    )
    method = OPD(
        Student("lab/arithmetic/student"),
        FrozenTeacher("lab/arithmetic/teacher"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        max_logprob_gap=1e-3,
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=HFEngine(),
        sampling=Sampling(max_new_tokens=12),
        prompts_per_step=4,
    )
    trainer.fit(method, datamodule=data)
    named = method.student.named_parameters()
    mine = {name: full_tensor(p.detach()).clone() for name, p in named}
    every = gather(mine)
    if trainer.is_global_zero:
        result = {"weights": mine, "of_ranks": every, "step_backs": watch.step_backs}
        torch.save(result, file)
    if torch.distributed.is_initialized():  # gloo may abort a process that exits first
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
