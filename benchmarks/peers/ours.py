"""A side of the comparison: this program.

Run by `python -m benchmarks.peers`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.peers.sizes import SIZES
from benchmarks.peers.turns import Turns, stages_of
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.methods import DivergenceOPD
from opd_lightning.models import student as student_file
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling, VLLMEngine
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.timing import StepTimer
from opd_lightning.training.callback import RunCallback


class TakeTurns(RunCallback):
    """Reports every step and waits for the next one's turn."""

    runs_last = True

    def __init__(self, turns: Any) -> None:
        self.turns = turns  # a `Turns`, or a test's
        self.tokens = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.turns.start()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += int(batch.response_mask.sum())
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module.timer.next_step()
        stages = stages_of(module.timer)
        stages["student"] -= stages["head"]
        if not self.turns.end(self.tokens, stages):
            trainer.should_stop = True
        self.tokens = 0


@contextmanager
def timed_head(timer: StepTimer) -> Iterator[None]:
    """Take the seconds of the heads' forward pass, both models', as a stage of its own."""
    score = student_file.score

    def timed(*args: Any, **kwargs: Any) -> Any:
        with timer.stage("head"):
            return score(*args, **kwargs)

    with patch.object(student_file, "score", timed):
        yield


def train(world: Path, name: str, engine: str, precision: str, callback: RunCallback) -> None:
    """Train until the callback stops the run.

    Args:
        world: Folder of `write_world`.
        name: Size, a key of `SIZES`.
        engine: "vllm" or "hf".
        precision: "float32", or "bfloat16" for autocast, teacher and engine.
        callback: Takes the turns.
    """
    size, half = SIZES[name], precision == "bfloat16"
    dtype: Any = "bfloat16" if half else "float32"
    engines = {"vllm": VLLMEngine, "hf": HFEngine}
    student = Student(str(world / "student"))
    module = DivergenceOPD(
        student,
        FrozenTeacher(str(world / "teacher"), dtype=dtype),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
    )
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if half else "32-true",
        max_steps=1_000_000,
        max_epochs=-1,
        accumulate_grad_batches=size.micro_batches,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(str(world / f"log-{engine}"), name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    data = RolloutDataModule(
        train=PromptSource(str(world / "prompts.jsonl")),
        engine=engines[engine](dtype=dtype),
        sampling=Sampling(max_new_tokens=size.response),
        prompts_per_step=size.rows,
    )
    with timed_head(module.timer):
        trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    folder, chosen, engine_name, kind = sys.argv[1:]
    train(Path(folder), chosen, engine_name, kind, TakeTurns(Turns()))
