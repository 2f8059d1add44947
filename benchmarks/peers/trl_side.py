"""A side of the comparison: TRL's trainers, with settings equal to ours.

Imports TRL, transformers, datasets and torch alone. Run by `python -m benchmarks.peers`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.peers.sizes import SIZES, Size
from benchmarks.peers.turns import Turns


class TakeTurns(TrainerCallback):
    """Reports every step and waits for the next one's turn."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.turns.end(self.tokens)
        self.tokens = 0


def counted(trainer_class: type) -> type:
    """Return a trainer whose callback `TakeTurns` learns how many response tokens it trains on."""

    class Counted(trainer_class):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen = inputs.get("completion_mask")  # of GKDTrainer: the labels
            count = (inputs["labels"] != -100).sum() if seen is None else seen.sum()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TakeTurns):
                    callback.tokens += int(count)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counted


def settings(world: Path, size: Size, precision: str) -> dict[str, Any]:
    """Return what both trainers' configurations have in common."""
    return {
        "output_dir": str(world / "trl"),
        "use_cpu": True,
        "bf16": precision == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": size.rows // size.micro_batches,
        "gradient_accumulation_steps": size.micro_batches,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": 1_000_000,
        "logging_steps": 1,
        "report_to": "tensorboard",
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 1.0,
        "temperature": 1.0,
    }


def distillation(world: Path, size: Size, precision: str) -> Any:
    dtype = {"dtype": precision}
    return counted(DistillationTrainer)(
        model=str(world / "student"),
        teacher_model=str(world / "teacher"),
        args=DistillationConfig(
            **settings(world, size, precision),
            max_completion_length=size.response,
            teacher_model_init_kwargs=dtype,
        ),
        train_dataset=datasets.load_dataset(
            "json", data_files=str(world / "prompts.jsonl"), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(world / "student"),
        callbacks=[TakeTurns()],
    )


def gkd(world: Path, size: Size, precision: str) -> Any:
    prompts = datasets.load_dataset("json", data_files=str(world / "prompts.jsonl"), split="train")
    reply = [{"role": "assistant", "content": "w3"}]  # lmbda 1: is replaced before it is learnt
    return counted(GKDTrainer)(
        model=AutoModelForCausalLM.from_pretrained(world / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(
            world / "teacher", dtype=getattr(torch, precision)
        ),
        args=GKDConfig(**settings(world, size, precision), max_new_tokens=size.response, lmbda=1.0),
        train_dataset=prompts.map(lambda row: {"messages": row["prompt"] + reply}).remove_columns(
            "prompt"
        ),
        processing_class=AutoTokenizer.from_pretrained(world / "student"),
        callbacks=[TakeTurns()],
    )


if __name__ == "__main__":
    folder, chosen, trainer, kind = sys.argv[1:]
    make = {"distillation": distillation, "gkd": gkd}[trainer]
    make(Path(folder), SIZES[chosen], kind).train()
