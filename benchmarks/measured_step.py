"""Memory, traffic and pushes of a small run, measured and compared with `opd check`'s formulas.

Writes a random Qwen3 and prompts, trains with the initial model as teacher over gloo, and compares
with `opd_lightning.preflight`: bytes of weights, gradients and optimiser after a step (of every
process, exact), the growth of the resident size while micro-batches are trained on, the bytes
passed to collectives, and the seconds of a push.

Run: python -m benchmarks.measured_step.py --strategy fsdp2 --ranks 2 [--precision bf16-mixed]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.observers import Collectives, Pushes, Record
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import generate_mixture
from opd_lightning.lab.problems import write_jsonl
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.methods import OPD
from opd_lightning.models.sharding import HSDPStrategy
from opd_lightning.models.student import Student
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import process_memory, student_bytes
from opd_lightning.preflight.plan import Plan, TeacherModel
from opd_lightning.preflight.traffic import push_traffic, step_traffic
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import AdapterOffTeacher, FrozenTeacher

# Return freed memory to the system at once, else the resident size stays at its maximum. Not set
# where seconds are measured: every large tensor then allocates new pages.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
GROUP = 2  # processes that share the weights under HSDP
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"]}


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write a random model to `folder`/model and prompts to `folder`/prompts.jsonl."""
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


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sharding = ModelParallelStrategy(options.ranks, 1)
    strategy = {
        "single": "auto",
        "ddp": "ddp",
        "fsdp2": sharding,
        "hsdp": HSDPStrategy(shard_size=GROUP),
    }[options.strategy]
    pushes, record = Pushes(folder / "push"), Record(Collectives())
    torch.manual_seed(0)  # for the adapters
    student = Student(
        str(folder / "model"),
        lora=LoraConfig(**LORA) if options.lora else None,
        gradient_checkpointing=options.checkpointing,
    )
    frozen = FrozenTeacher(str(folder / "model"))
    teacher = AdapterOffTeacher() if options.adapter_off else frozen
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
    """Return the estimates of `opd check`, from shapes alone."""
    meta, alike = student.build(empty=True), Student(student.source.path).build(empty=True)
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
        teachers=[] if options.adapter_off else [TeacherModel(alike, sharded=True)],
        readings=int(options.adapter_off),
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


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=["single", "ddp", "fsdp2", "hsdp"], default="single")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--adapter_off", action="store_true", help="the teacher is the LoRA's base")
    parser.add_argument("--pushes", action="store_true", help="time pushes too")
    sizes = {"hidden": 512, "layers": 8, "vocabulary": 8192, "rows": 8, "tokens": 48}
    for name, size in {**sizes, "micro_batches": 2, "steps": 3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--out", type=Path, help="JSON file: a list of every process's figures")
    return parser.parse_args(words)


def main() -> None:
    warnings.filterwarnings("ignore")
    options = parse()
    wanted = QUIET | os.environ | ({} if options.pushes else MALLOC)
    if wanted != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, wanted)
    with TemporaryDirectory() as place:
        folder = Path(os.environ.setdefault("MEASURED_STEP", place))
        if folder == Path(place):  # the other processes run this script again
            write_inputs(folder, options)
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
    shards = {"fsdp2": options.ranks, "hsdp": GROUP}.get(options.strategy, 1)
    inside, across = 1 - 1 / shards, 1 - shards / options.ranks
    for name, size in plan["sent"].items():
        factor = 2 * across if name == "all_reduce" else inside
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
