"""Program `faulty_ranks STRATEGY FAULT FILE`: trains on two ranks; the second has the fault.

"nan": a log-prob of its teacher is NaN at step 1; "nan for good": from then on. "killed": it is,
while it writes for step 1; "killed while the other writes": likewise, and rank 0's engine is busy
for long. "hangs": its engine sleeps then. Each rank writes its observations to FILE with its
number as suffix.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.cli import one_line_errors
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import OPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.types import Completion
from opd_lightning.verifiers import ExactMatch
from tests.integration.test_skipped_steps import Moved, OddTeacher


class Engine(HFEngine):
    """Engine with a fault at its second call."""

    calls = 0
    event: Callable[[], None] | None = None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        if self.calls == 2 and self.event is not None:
            self.event()
        return super().generate(requests, sampling)


def sleep() -> None:
    time.sleep(600)


def die() -> None:
    print("killed at", time.time(), file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


EVENTS = {
    ("hangs", 1): sleep,
    ("killed", 1): die,
    ("killed while the other writes", 0): sleep,
    ("killed while the other writes", 1): die,
}


def main(strategy: str, fault: str, file: str) -> None:
    moved = Moved()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp" if strategy == "ddp" else ModelParallelStrategy(2, 1),
        max_steps=3,
        max_epochs=-1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[
            moved,
            ModelCheckpoint(f"{file}-checkpoints", every_n_train_steps=1, save_last=True),
        ],
    )
    engine = Engine()
    engine.event = EVENTS.get((fault, trainer.global_rank))
    odd = {"nan": [1], "nan for good": [1, 2]}.get(fault, []) if trainer.global_rank == 1 else []
    method = OPD(
        Student("lab/arithmetic/student"),
        OddTeacher("lab/arithmetic/teacher", odd),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        max_logprob_gap=1e-3,
        stop_after_skips=2,
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=engine,
        verifier=ExactMatch(ANSWER_PATTERN),
        sampling=Sampling(max_new_tokens=8),
        prompts_per_step=4,
        engine_time_limit=3.0 if fault == "hangs" else 0,
    )
    trainer.fit(method, datamodule=data)
    logged = float(trainer.callback_metrics["optim/skipped_steps"])
    torch.save({"moved": moved.of_step, "skipped": logged}, f"{file}{trainer.global_rank}")
    # gloo may abort a process that exits first
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of shells ignore it
    with one_line_errors():
        main(*sys.argv[1:4])
