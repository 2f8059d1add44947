"""A script: `sharded.py RANKS FILE` trains in the untrained lab it is run in, several ways.

With two ranks the models are sharded (FSDP2) and steps have two micro-batches each. Rank 0 writes
what it recorded of every way.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks import EMATeacherUpdate
from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import GOPD, OPD, DistillationModule, DivergenceOPD
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rules import PhasedFloor, StabilityWeight
from opd_lightning.sharding import whole
from opd_lightning.student import Student
from opd_lightning.teachers import (
    AdapterOffTeacher,
    ByDomainTeacher,
    EMATeacher,
    FrozenTeacher,
    Teacher,
)
from opd_lightning.teachers.local import OwnModelTeacher
from opd_lightning.trainer import Trainer
from opd_lightning.verifiers import ExactMatch

STUDENT, TEACHER = "lab/arithmetic/student", "lab/arithmetic/teacher"


class Record(Callback):
    """What is compared between one process and two."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []  # at the start and at the end, for an engine
        self.gradients: list[dict[str, Tensor]] = []  # averaged over ranks, over micro-batches
        self.logged: list[dict[str, float]] = []
        self.held = 0.0  # share of all models' parameters in this process, between two steps
        self.empty = 0  # micro-batches without a token to learn from, on all ranks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append({n: t.clone() for n, t in pl_module.student.weights()})

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.empty += int(trainer.strategy.reduce(~batch.response_mask.any(), reduce_op="sum"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = [(n, p.grad) for n, p in pl_module.student.named_parameters() if p.requires_grad]
        self.gradients.append({name: whole(g).clone() for name, g in named})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
            parts = [part for teacher in pl_module.teachers() for part in teacher.parts()]
            own = [part.model() for part in parts if isinstance(part, OwnModelTeacher)]
            parameters = [p for model in (pl_module.student, *own) for p in model.parameters()]
            here = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
            self.held = sum(p.numel() for p in here) / sum(p.numel() for p in parameters)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_start(trainer, pl_module)


def train(
    method: DistillationModule,
    ranks: int,
    *,
    steps: int = 3,
    micro_batches: int = 2,
    folder: bool = False,
    save: str = "",
    resume: str | None = None,
    mix: RolloutMix = RolloutMix(),  # noqa: B008
    **trainer_args: Any,
) -> dict[str, Any]:
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=folder
        )
        if ranks > 1
        else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches if ranks > 1 else 1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record, EMATeacherUpdate()],
        log_every_n_steps=1,
        **trainer_args,
    )
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        teacher=TeacherSampler(path=TEACHER, engine=HFEngine()) if mix.teacher else None,
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        sampling=Sampling(max_new_tokens=24),
        prompts_per_step=4,
        samples_per_prompt=2,
        mix=mix,
    )
    trainer.fit(method, datamodule=data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    names = ("weights", "gradients", "logged", "held", "empty")
    return {name: getattr(record, name) for name in names}


def student(path: str = STUDENT, lora: Sequence[str] = (), **more: Any) -> Student:
    torch.manual_seed(0)  # of the adapters
    config = LoraConfig(r=4, target_modules=list(lora), init_lora_weights=False, use_rslora=True)
    return Student(path, lora=config if lora else None, **more)


def shared(**more: Any) -> dict[str, Any]:
    return {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **more}


def sampled() -> DistillationModule:
    # What looks at the whole step must look at all of its ranks.
    rules = [StabilityWeight(tau=0.5), PhasedFloor(mixing=0.3, switch_step=1)]
    return OPD(student(), FrozenTeacher(TEACHER), rules=rules, **shared(aggregation="mask-mean"))


def divergence() -> DistillationModule:
    return DivergenceOPD(student(), FrozenTeacher(TEACHER), **shared())


def moving() -> DistillationModule:
    one = student(gradient_checkpointing=True)
    return GOPD(one, FrozenTeacher(TEACHER), EMATeacher(rate=0.5), scale=1.5, **shared())


def bare() -> DistillationModule:
    one = student("untied", lora=("q_proj", "lm_head"))
    return DivergenceOPD(one, AdapterOffTeacher(), **shared())


def adapters() -> DistillationModule:
    one = student(lora=("q_proj", "down_proj"))
    return GOPD(one, FrozenTeacher(TEACHER), AdapterOffTeacher(), scale=1.5, **shared())


def domains() -> DistillationModule:
    # The order of prompts gives some micro-batches one domain alone.
    teachers: dict[str, Teacher] = {
        "add-2": FrozenTeacher(TEACHER),
        "sub-2": FrozenTeacher(STUDENT),
    }
    return OPD(student(), ByDomainTeacher(teachers), **shared())


def adam() -> DistillationModule:
    method = moving()
    method.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    return method


def continued(folder: bool) -> dict[str, Any]:
    """A run that is interrupted after two of four steps."""
    path = f"checkpoint-{folder}"
    first = train(adam(), 2, steps=2, folder=folder, save=path)
    assert Path(path).is_dir() is folder
    return {"first": first, "second": train(adam(), 2, steps=4, folder=folder, resume=path)}


def main(ranks: int, file: str) -> None:
    warnings.filterwarnings("ignore")
    found = {
        "sampled": train(sampled(), ranks, gradient_clip_val=0.05),
        "divergence": train(divergence(), ranks),
        "moving": train(moving(), ranks),
        "bare": train(bare(), ranks),
        "adapters": train(adapters(), ranks),
        "domains": train(domains(), ranks),
        "bfloat16": train(divergence(), ranks, precision="bf16-mixed"),
        "bfloat16 adapters": train(bare(), ranks, precision="bf16-mixed"),
        # Some ranks write nothing, and some micro-batches have nothing to learn from.
        "dropped": train(divergence(), ranks, mix=RolloutMix(teacher=0.5, only_correct=True)),
    }
    if ranks > 1:
        found["unbroken"] = train(adam(), 2, steps=4)
        for folder in (False, True):
            found[f"continued {folder}"] = continued(folder)
    if int(torch.distributed.get_rank() if ranks > 1 else 0) == 0:
        torch.save(found, file)
    if torch.distributed.is_initialized():  # gloo's threads may abort a process that leaves first
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
