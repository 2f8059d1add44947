"""A script: `two_ranks.py RANKS MICRO_BATCHES STALENESS FILE` trains in the untrained lab.

Rank 0 writes the gradients before each optimiser step, what was logged, and a checkpoint beside it.
"""

import sys
from typing import Any

import torch
from lightning.pytorch import Callback

from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import OPD
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rules import PhasedFloor, StabilityWeight, TruncatedImportance
from opd_lightning.student import Student
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.trainer import Trainer
from opd_lightning.verifiers import ExactMatch


class Record(Callback):
    """Gradients as the optimiser sees them: averaged over ranks, summed over micro-batches."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named})


def main(ranks: int, micro_batches: int, staleness: int, file: str) -> None:
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=2,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
        log_every_n_steps=1,
    )
    student = Student("lab/arithmetic/student")
    method = OPD(
        student,
        FrozenTeacher("lab/arithmetic/teacher"),
        # What looks at the whole step must look at all of its ranks.
        rules=[
            StabilityWeight(tau=0.5),
            PhasedFloor(mixing=0.3, switch_step=1),
            TruncatedImportance(unit_mean=True),
        ],
        aggregation="mask-mean",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        max_logprob_gap=1e-3,
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        sampling=Sampling(max_new_tokens=12),
        prompts_per_step=4,
        samples_per_prompt=3,
        max_staleness=staleness,  # type: ignore[arg-type]
    )
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(f"{file}.ckpt")
    if trainer.is_global_zero:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        torch.save({"gradients": record.gradients, "logged": logged}, file)
    if torch.distributed.is_initialized():  # gloo's threads may abort a process that leaves first
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ranks, micro_batches, staleness = map(int, sys.argv[1:4])
    main(ranks, micro_batches, staleness, sys.argv[4])
