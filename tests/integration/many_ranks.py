"""A program: `many_ranks LAYOUT FILE PART...` trains in the untrained lab it is run in.

In all the ways of the parts, over the processes of a layout. Rank 0 writes what it recorded.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks import CapabilityRetention, EMATeacherUpdate
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.models.sharding import HSDPStrategy, full_tensor
from opd_lightning.processes import Ranks
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers.local import OwnModelTeacher
from opd_lightning.types import WholeStep
from opd_lightning.verifiers import ExactMatch
from tests.integration.ways import SAMPLES, TEACHER, Way, adam, moving, ways

PROMPTS = 8  # of a step
RECORDED = "lab/arithmetic/demonstrations.jsonl"
TASKS = "tasks"


class Layout(NamedTuple):
    """Who shares the work."""

    ranks: int
    micro_batches: int
    strategy: Any  # (write a folder of shards) -> a strategy


LAYOUTS = {
    "one": Layout(1, 1, lambda folder: "auto"),
    "ddp": Layout(2, 2, lambda folder: "ddp"),
    "ddp, unused": Layout(2, 2, lambda folder: DDPStrategy(find_unused_parameters=True)),
    "fsdp2": Layout(2, 2, lambda folder: ModelParallelStrategy(2, 1, folder)),
    "fsdp2, 1": Layout(2, 1, lambda folder: ModelParallelStrategy(2, 1, folder)),
    "hsdp": Layout(4, 2, lambda folder: HSDPStrategy(2, folder)),
}


SAVED_AS = ("shards", "file")  # parts beside those of `ways`: a folder of shards, or one file


class Record(Callback):
    """What is compared between one process and several."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []  # at the start and at the end, for an engine
        self.gradients: list[dict[str, Tensor]] = []  # averaged over ranks, over micro-batches
        self.logged: list[dict[str, float]] = []
        self.rollouts: list[tuple[int, int, list[int], int]] = []  # step, prompt, ids, version
        self.held = 0.0  # share of all models' parameters in this process, between two steps
        self.parts: list[int] = []  # micro-batches of each of Lightning's batches
        self.fillers = 0  # on all ranks
        self.empty = 0  # micro-batches without a token to learn from, on all ranks
        self.proved: list[str] = []  # weights that the engine was seen to hold
        self.dtypes: list[str] = []  # of a layer's weight while it is at work

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append({n: t.clone() for n, t in pl_module.student.weights()})
        for name, layer in pl_module.student.named_modules():
            if name.endswith("layers.0.mlp.up_proj"):
                layer.register_forward_pre_hook(
                    lambda layer, _: self.dtypes.append(str(layer.weight.dtype))
                )

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.proved = [n for held in trainer.datamodule.engine.weight_sums() for n in held.names]
        batches = batch if isinstance(batch, WholeStep) else [batch]
        self.parts.append(len(batches))
        for one in batches:
            filler = torch.tensor(int(one.is_filler))
            self.fillers += int(trainer.strategy.reduce(filler, reduce_op="sum"))
            empty = (~one.response_mask.any()).long()
            self.empty += int(trainer.strategy.reduce(empty, reduce_op="sum"))
            rollouts = [] if one.is_filler else one.rollouts
            step = one.totals.step
            mine = [(step, r.group, r.response_ids, r.policy_version) for r in rollouts]
            self.rollouts += [row for rows in Ranks.of(trainer).gather(mine) for row in rows]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = [(n, p.grad) for n, p in pl_module.student.named_parameters() if p.requires_grad]
        self.gradients.append({name: full_tensor(g).clone() for name, g in named})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
            parts = pl_module.teacher_parts()
            own = [part.model() for part in parts if isinstance(part, OwnModelTeacher)]
            parameters = [p for model in (pl_module.student, *own) for p in model.parameters()]
            here = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
            self.held = sum(p.numel() for p in here) / sum(p.numel() for p in parameters)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append({n: t.clone() for n, t in pl_module.student.weights()})
        self.rollouts.sort()


def train(
    way: Way, layout: Layout, *, folder: bool = False, save: str = "", resume: str | None = None
) -> dict[str, Any]:
    record = Record()
    callbacks: list[Callback] = [record, EMATeacherUpdate()]
    often, texts, tasks = {}, {}, {}
    budget = "max_tokens_per_micro_batch"
    if way.watched:  # one text more than two ranks have rows, and a batch that one of them has
        callbacks.append(CapabilityRetention(["sub-2"], keep_pareto=False))
        for domain, limit in (("sub-2", 5), ("add-2", 3)):
            source = PromptSource(RECORDED, domains=[domain], limit=limit)
            texts[domain] = LikelihoodSuite(prompts=source, batch_size=2)
        for task in ("rolling", "writing"):  # read first, then written by weights pushed anew
            tasks[task] = HarnessTask(task=task, include_path=TASKS, limit=3, batch_size=2)
        # Every second step.
        often = {"val_check_interval": 2 * layout.micro_batches, "check_val_every_n_epoch": None}
    trainer = Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=layout.strategy(folder),
        max_steps=way.steps,
        max_epochs=-1,
        accumulate_grad_batches=1 if budget in way.data else layout.micro_batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        log_every_n_steps=1,
        **often,
        **way.trainer,
    )
    writes = "mix" in way.data and way.data["mix"].teacher
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl", columns={"privileged": "answer"}),
        teacher=TeacherSampler(path=TEACHER, engine=HFEngine()) if writes else None,
        verifier=ExactMatch(ANSWER_PATTERN),
        sampling=Sampling(max_new_tokens=16),
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        texts=texts,
        tasks=tasks,
        **{"engine": HFEngine(), **way.data},
    )
    trainer.fit(way.method(), datamodule=data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    counted = ("held", "parts", "fillers", "empty")
    names = ("weights", "gradients", "logged", "rollouts", *counted, "proved", "dtypes")
    return {name: getattr(record, name) for name in names}


def resumed(layout: Layout, path: str, *, folder: bool) -> dict[str, Any]:
    """A run of three steps, and one that was interrupted after two and saved to `path`."""
    whole_run = Way(method=lambda: moving(adam), steps=3)
    half = Way(method=lambda: moving(adam), steps=2)
    first = train(half, layout, folder=folder, save=path)
    assert Path(path).is_dir() is folder
    second = train(whole_run, layout, folder=folder, resume=path)
    return {"unbroken": train(whole_run, layout), "first": first, "second": second}


def main(name: str, file: str, *parts: str) -> None:
    warnings.filterwarnings("ignore")
    layout = LAYOUTS[name]
    found = {
        part: resumed(layout, f"{name}-{part}", folder=part == "shards")
        if part in SAVED_AS
        else {key: train(way, layout) for key, way in ways(PROMPTS)[part].items()}
        for part in parts
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, file)
    if dist.is_initialized():  # gloo's threads may abort a process that leaves first
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
