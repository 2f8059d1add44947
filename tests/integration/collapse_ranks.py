"""A script: `collapse_ranks.py RANKS FILE` trains in the untrained lab and steps back once.

Plain gradient descent, so that a step back shows in the weights. Rank 0 writes its weights at the
end, those of all ranks, and how often the run stepped back.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints.together import gather
from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.data.prompts import PromptSource
from opd_lightning.methods import OPD
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.student import Student
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.test_collapse import watch_all


def main(ranks: int, file: Path) -> None:
    watch = watch_all()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
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
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        max_logprob_gap=1e-3,
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=HFEngine(),
        sampling=Sampling(max_new_tokens=12),
        prompts_per_step=4,
    )
    trainer.fit(method, datamodule=data)
    mine = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    every = gather(mine)
    if trainer.is_global_zero:
        result = {"weights": mine, "of_ranks": every, "step_backs": watch.step_backs}
        torch.save(result, file)
    if torch.distributed.is_initialized():  # gloo's threads may abort a process that leaves first
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
