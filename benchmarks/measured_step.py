"""What one process of a small real run holds, sends and waits for, against the formulas.

Writes a random Qwen3 and prompts, trains it against itself with Lightning over gloo, and compares
with `opd_lightning.preflight`: bytes of weights, gradients and optimiser after a step (of every
process, exact), the growth of the resident size while micro-batches are trained on, the bytes
handed to collectives, and the seconds of a push.

Run: python benchmarks/measured_step.py --strategy fsdp2 --ranks 2 [--precision bf16-mixed]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.data.engines import push
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import generate_mixture, write_jsonl
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.methods import OPD
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import process_memory, student_bytes
from opd_lightning.preflight.plan import Plan, TeacherModel
from opd_lightning.preflight.traffic import push_traffic, step_traffic
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rollouts.push_folder import PushFolder
from opd_lightning.student import Student
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.trainer import Trainer

# Freed memory goes back at once, or the resident size would remember the largest step. Not where
# seconds are measured: it makes every large tensor's pages anew.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COLLECTIVES = {
    "all_reduce": ("c10d.allreduce_.", "_c10d_functional.all_reduce."),
    "all_gather": ("c10d._allgather_base_.", "_c10d_functional.all_gather_into_tensor."),
    "reduce_scatter": ("c10d._reduce_scatter_base_.",),
}
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
WAITS = 5  # times that a push is timed


def write_world(folder: Path, options: argparse.Namespace) -> None:
    """A random model in `folder`/model and prompts beside it."""
    tokenizer = build_tokenizer(256)
    missing = options.vocabulary - len(tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(missing)])
    tokenizer.save_pretrained(folder / "model")
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(options.seed)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    problems = generate_mixture(("add-2",), 64, seed=options.seed, held_out=False)
    write_jsonl(folder / "prompts.jsonl", problems)


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors in every collective, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, begins in COLLECTIVES.items():
            if str(func).startswith(begins):
                self.sent[name] += max(_nbytes(x) for x in args[:2]) * (
                    args[1] if "functional.all_gather" in str(func) else 1
                )
        return func(*args, **(kwargs or {}))


class Record(Callback):
    """Looks at a process between the steps of a run and within them."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.held: dict[str, int] = {}
        self.growth: list[int] = []  # of the resident size, in bytes, per step
        self.sent: dict[str, int] = {}
        self.tokens: list[int] = []  # of responses, per micro-batch of this process
        self._begun = -1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.tokens.append(int(batch.response_mask.sum()))
        if trainer.global_step > self._begun:
            self._begun = trainer.global_step
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            self._resident = _status("VmRSS")
            self.collectives.sent.clear()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.growth.append(_status("VmHWM") - self._resident)
        self.sent = dict(self.collectives.sent)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        parameters = list(module.student.parameters())
        states = [s for p in trainer.optimizers[0].state.values() for s in p.values()]
        self.held = {
            "weights": _local(parameters),
            "gradients": _local([p.grad for p in parameters if p.grad is not None]),
            "optimizer": _local(states),
        }


class Pushes(Callback):
    """Times pushes of the student, at the end of the run."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}  # on the wall, of this process
        self._folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        engine, student = HFEngine(), module.student
        engine.start(student.source, max_length=128)
        shared = PushFolder(self._folder, torch.float32)

        def gather() -> None:
            for _ in student.weights():
                pass

        def to_folder() -> None:
            if trainer.is_global_zero:
                shared.write("0", student.weights())
            else:
                gather()

        for name, way in {
            "gather": gather,
            "in process, unproved": lambda: engine.load_weights(0, student.weights()),
            "in process": lambda: push(student, engine, version=0),
            "to a folder": to_folder,
        }.items():
            for _ in range(WAITS):
                trainer.strategy.barrier()
                began, worked = perf_counter(), process_time()
                way()
                passed = perf_counter() - began, process_time() - worked
                self.seconds.setdefault(name, []).append(passed)


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sharding = ModelParallelStrategy(options.ranks, 1)
    strategy = {"single": "auto", "ddp": "ddp", "fsdp2": sharding}[options.strategy]
    pushes, record = Pushes(folder / "push"), Record(Collectives())
    torch.manual_seed(0)  # of the adapters
    student = Student(
        str(folder / "model"),
        lora=LoraConfig(**LORA) if options.lora else None,
        gradient_checkpointing=options.checkpointing,
    )
    teacher = FrozenTeacher(str(folder / "model"))
    trainer = Trainer(
        accelerator="cpu",
        devices=options.ranks,
        strategy=strategy,
        precision=options.precision,
        max_steps=options.steps,
        max_epochs=-1,
        accumulate_grad_batches=options.micro_batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record, *([pushes] if options.pushes else [])],
    )
    data = RolloutDataModule(
        train=PromptSource(str(folder / "prompts.jsonl")),
        engine=HFEngine(),
        sampling=Sampling(max_new_tokens=options.tokens),
        prompts_per_step=options.rows * options.micro_batches * options.ranks,
    )
    with record.collectives:
        trainer.fit(OPD(student, teacher, max_logprob_gap=10.0), datamodule=data)
    return {
        "held": record.held,
        "growth": record.growth,
        "sent": record.sent,
        "tokens": sum(record.tokens) // options.steps,
        "pushes": pushes.seconds,
        "predicted": predicted(student, trainer, options),
    }


def predicted(student: Student, trainer: Trainer, options: argparse.Namespace) -> dict[str, Any]:
    """What `opd check` would say, from shapes alone."""
    meta = student.build(empty=True)
    plan = Plan(
        student=meta,
        config=student.source.config,
        optimizer=torch.optim.AdamW([p for p in meta.parameters() if p.requires_grad]),
        layout=Layout.of(trainer),
        precision=str(trainer.precision),
        checkpointing=options.checkpointing,
        on_gpu=False,
        rows=options.rows,
        length=options.tokens + 12,
        response=options.tokens,
        micro_batches=options.micro_batches,
        teachers=[TeacherModel(Student(student.source.path).build(empty=True), sharded=True)],
    )
    memory = process_memory(plan)
    return {
        "held": student_bytes(meta.parameters(), plan.optimizer, plan.layout),
        "training": memory.training,
        "sent": step_traffic(plan),
        "push_gather": push_traffic(plan),
        "weights": sum(p.numel() * p.element_size() for p in meta.parameters()),
        "tokens": options.rows * options.micro_batches * options.tokens,
    }


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def _local(tensors: list[Any]) -> int:
    here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in here)


def _status(name: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--strategy", choices=["single", "ddp", "fsdp2"], default="single")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--pushes", action="store_true", help="time pushes too")
    sizes = {"hidden": 512, "layers": 8, "vocabulary": 8192, "rows": 8, "tokens": 48}
    for name, size in {**sizes, "micro_batches": 2, "steps": 3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--out", type=Path, help="JSON, a list with what every process found")
    return parser.parse_args(words)


def main() -> None:
    warnings.filterwarnings("ignore")
    options = parse()
    wanted = QUIET | os.environ | ({} if options.pushes else MALLOC)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    with TemporaryDirectory() as place:
        folder = Path(os.environ.setdefault("MEASURED_STEP", place))
        if folder == Path(place):  # the other processes run this script again
            write_world(folder, options)
        found = train(options, folder)
        every: list[Any] = [found]
        if dist.is_initialized():
            every = [None] * options.ranks
            dist.all_gather_object(every, found)
            dist.barrier()
            dist.destroy_process_group()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        if options.out:
            options.out.write_text(json.dumps(every))
        show(every, options)


def show(every: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(" ".join(sys.argv[1:]), "| threads", os.environ["OMP_NUM_THREADS"])
    first, plan = every[0], every[0]["predicted"]
    for name, size in plan["held"].items():
        print(f"{name:12} {size:>12,} predicted, measured {[x['held'][name] for x in every]}")
    total = sum(plan["training"].values())
    print(f"training     {total:>12,} predicted {plan['training']}")
    print(f"  growth of the resident size, per step {[x['growth'] for x in every]}")
    print(f"tokens       {plan['tokens']} at most, measured {[x['tokens'] for x in every]}")
    share = 1 - 1 / options.ranks
    for name, size in plan["sent"].items():
        factor = 2 * share if name == "all_reduce" else share
        measured = first["sent"].get(name, 0) * factor
        print(f"{name:14} {size:>12,.0f} predicted, measured {measured:,.0f}")
    for name, both in first["pushes"].items():
        wall, own = ([x[i] for x in both] for i in (0, 1))
        print(
            f"push, {name}: {plan['weights']:,} bytes, {median(wall):.3f} s "
            f"({min(wall):.3f} to {max(wall):.3f}), of this process {median(own):.3f} s "
            f"({min(own):.3f} to {max(own):.3f})"
        )


if __name__ == "__main__":
    main()
