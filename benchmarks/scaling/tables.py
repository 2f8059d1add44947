"""The tables of docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from benchmarks.scaling.models import SHAPES, TEACHERS, cached_bytes, model, weight_bytes
from benchmarks.scaling.plans import choose, configuration
from benchmarks.scaling.run import Run, broadcast_seconds, copy_seconds, folder_seconds
from benchmarks.scaling.speeds import (
    AT_ONCE,
    GB,
    LONGEST,
    MEAN,
    MEMORY,
    PROMPT,
    ROLLOUTS,
    decoding_seconds,
    decoding_step_seconds,
    gpus_of_engine,
    sequences,
    served_bytes,
    teacher_gpu_seconds,
)
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import gathered_bytes, held_bytes
from opd_lightning.preflight.traffic import push_traffic, step_traffic


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gb(size: float) -> str:
    return f"{size / GB:.1f}"


def models_table() -> str:
    heads = ["student", "hidden", "layers", "heads", "KV heads", "intermediate", "embedding tied",
             "parameters", "of them in layers", "largest layer"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        s = SHAPES[name]
        every = sum(p.numel() for p in model(name).parameters())
        layer = sum(p.numel() for p in model(name).model.layers[0].parameters())
        rows.append([name, *s[:5], "yes" if s.tied else "no", f"{every:,}",
                     f"{layer * s.layers:,}", f"{layer:,}"])  # fmt: skip
    return table(heads, rows)


def layouts(name: str) -> list[Run]:
    ways = [(1, 1), (8, 1), (8, 8), (64, 8), (64, 16), (64, 64)]
    return [Run(name, world, shards, remote=True, servers=1) for world, shards in ways]


def memory_table() -> str:
    heads = ["student", "GPUs", "strategy", "weights", "gradients", "AdamW", "DDP's buckets",
             "bf16 copies or gathered", "gradients on their way", "activations", "head",
             "AdamW's roots", "a push", "peak", "fits"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        for run in layouts(name):
            memory = run.memory()
            part = memory.always | memory.training | memory.optimizer_step | memory.pushing
            copies = part.get("gathered", part.get("autocast_copies", 0))
            cells = [part["weights"], part["gradients"], part["optimizer"], part["ddp_buckets"],
                     copies, part.get("gathered_gradients", 0), part["activations"],
                     part["head"], part["update"], part["push"],
                     run.trainer_bytes]  # fmt: skip
            rows.append([name, run.trainers, run.strategy, *map(gb, cells),
                         "yes" if run.trainer_bytes <= MEMORY else "no"])  # fmt: skip
    return table(heads, rows)


def activations_table() -> str:
    heads = ["student", "tokens", "kept", "with gradient checkpointing", "head"]
    rows = []
    for name in TEACHERS:
        for many in (1, 2, 4):
            both = [
                Run(name, 1, 1, checkpointing=c, rows=many, remote=True).memory().training
                for c in (False, True)
            ]
            tokens = f"{many} x {LONGEST:,}"
            rows.append([name, tokens, *(gb(x["activations"]) for x in both), gb(both[1]["head"])])
    return table(heads, rows)


def budget_table() -> str:
    """Micro-batches of eight processes that shard: by rows of the longest, and by a budget."""
    heads = ["student", "`max_tokens_per_micro_batch`", "activations", "micro-batches without it",
             "with it", "sent in a step without it", "with it"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        for many in (1, 2, 4):
            run, budget = Run(name, 8, 8, rows=many, remote=True, servers=1), many * LONGEST
            needed = math.ceil(ROLLOUTS / 8 * (PROMPT + MEAN) / budget)
            sent = [
                sum(step_traffic(replace(run.plan(), micro_batches=n)).values())
                for n in (run.micro_batches, needed)
            ]
            rows.append([name, f"{budget:,}", gb(run.memory().training["activations"]),
                         run.micro_batches, needed, *map(gb, sent)])  # fmt: skip
    return table(heads, rows)


def others_table() -> str:
    heads = ["model", "teacher: whole", "1/8", "1/64", "gathered while a step trains",
             "EMA teacher: whole", "1/64", "student under LoRA: weights",
             "gradients and AdamW"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        half, full = model(name, half=True), model(name)
        layouts = [Layout(world=n, shards=n) for n in (1, 8, 64)]
        cells = [held_bytes(half.parameters(), x) for x in layouts]
        cells.append(gathered_bytes(half, layouts[1]))
        cells += [held_bytes(full.parameters(), x) for x in (layouts[0], layouts[2])]
        lora = Run(name, 1, 1, remote=True, lora=True).memory().always
        cells += [lora["weights"], lora["gradients"] + lora["optimizer"]]
        rows.append([name, *map(gb, cells)])
    return table(heads, rows)


def engines_table() -> str:
    heads = ["student", "weights, bf16", "KV cache a token", "GPUs an engine",
             f"sequences of {PROMPT + MEAN:,} tokens in it", "ms a decoding step of 1 row",
             "of as many as fit", "tokens/s"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        gpus, size = gpus_of_engine(name), cached_bytes(name)
        most = sequences(name, served_bytes(name))
        rows_at_once = (1, min(AT_ONCE, most))
        one, many = (decoding_step_seconds(name, n, gpus) for n in rows_at_once)
        speed = ROLLOUTS * MEAN / decoding_seconds(name, ROLLOUTS, gpus, served_bytes(name))
        rows.append([name, gb(weight_bytes(name)) + " GB", f"{size / 1024:.0f} KiB", gpus,
                     f"{most:.0f}", f"{1e3 * one:.1f}", f"{1e3 * many:.1f}",
                     f"{speed:,.0f}"])  # fmt: skip
    return table(heads, rows)


def traffic_table() -> str:
    heads = ["student", "GPUs", "strategy", "micro-batches", "gathered", "scattered", "reduced",
             "gathered for a push", "seconds a step",
             "seconds of the student's passes"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        for run in layouts(name)[1:]:
            plan = run.plan()
            sent = step_traffic(plan)
            cells = [sent.get(x, 0.0) for x in ("all_gather", "reduce_scatter", "all_reduce")]
            rows.append([name, run.trainers, run.strategy, run.micro_batches, *map(gb, cells),
                         gb(push_traffic(plan)), f"{run.traffic_seconds():.1f}",
                         f"{run.student_seconds():.1f}"])  # fmt: skip
    return table(heads, rows)


def push_table() -> str:
    heads = ["student", "bytes for an engine", "gather: DDP", "8 shards, one node", "64 shards",
             "copy in process", "shared folder", "NCCL broadcast"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        runs = [Run(name, w, s, remote=True) for w, s in ((8, 1), (8, 8), (64, 64))]
        cells = [run.gather_seconds() for run in runs]
        cells += [copy_seconds(name), folder_seconds(name), broadcast_seconds(name)]
        rows.append([name, gb(weight_bytes(name)) + " GB", *(f"{x:.2f} s" for x in cells)])
    return table(heads, rows)


def plans_table() -> str:
    heads = ["student", "GPUs", "trains", "trainers", "engines", "teacher", "rows x micro-batches",
             "GB of a trainer", "write", "student", "teacher", "traffic", "push", "step",
             "response tokens/s"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        for gpus in (1, 8, 64):
            if (run := choose(name, gpus)) is None:
                rows.append([name, gpus, "nothing fits", *[""] * 12])
                continue
            seconds = [run.generate_seconds(), run.student_seconds(), run.teacher_seconds(),
                       run.traffic_seconds(), run.push_seconds(), run.step_seconds()]  # fmt: skip
            size = gpus_of_engine(name)
            engines = (
                f"{run.servers // size} servers of {size}"
                if run.servers
                else f"asleep, {run.engine_share:.0%}"
            )
            elsewhere = math.ceil(teacher_gpu_seconds(name) / seconds[1] / 2) * 2
            teacher = f"{elsewhere} GPUs elsewhere" if run.remote else "here"
            rows.append([name, gpus, "LoRA" if run.lora else "all",
                         f"{run.trainers}, {run.strategy}", engines,
                         f"{TEACHERS[name]}, {teacher}", f"{run.rows} x {run.micro_batches}",
                         gb(run.trainer_bytes), *(f"{x:.1f} s" for x in seconds),
                         f"{ROLLOUTS * MEAN / seconds[-1]:,.0f}"])  # fmt: skip
    return table(heads, rows)


def balance_table() -> str:
    heads = ["student", "teacher", "GPU-seconds to write", "of the student's passes",
             "of the teacher's", "GPUs that write for one that trains"]  # fmt: skip
    rows = []
    for name in TEACHERS:
        gpus = gpus_of_engine(name)
        writes = gpus * decoding_seconds(name, ROLLOUTS, gpus, served_bytes(name))
        trains, teaches = Run(name, 1, 1).student_seconds(), teacher_gpu_seconds(name)
        cells = [f"{x:.0f}" for x in (writes, trains, teaches)]
        rows.append([name, TEACHERS[name], *cells, f"{writes / (trains + teaches):.2f}"])
    return table(heads, rows)


TABLES = {
    "models": models_table,
    "memory": memory_table,
    "activations": activations_table,
    "budget": budget_table,
    "others": others_table,
    "engines": engines_table,
    "traffic": traffic_table,
    "push": push_table,
    "balance": balance_table,
    "plans": plans_table,
    "one GPU": lambda: configuration("1.7B", 1),
    "a node": lambda: configuration("4B", 8),
    "eight nodes": lambda: configuration("32B", 64),
}
