"""Estimates of a step's cost: tokens, memory of a process, traffic, seconds."""

from __future__ import annotations

import math
from collections import Counter
from statistics import mean
from typing import TYPE_CHECKING

import torch

from opd_lightning.models.causal_lm import empty_causal_lm
from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import process_memory
from opd_lightning.preflight.plan import Plan, TeacherModel
from opd_lightning.preflight.probe import Probe
from opd_lightning.preflight.step_shape import StepShape
from opd_lightning.preflight.traffic import push_traffic, step_traffic
from opd_lightning.preflight.widths import Widths
from opd_lightning.rollouts import HFEngine, VLLMEngine
from opd_lightning.rollouts.base import Engine
from opd_lightning.teachers import AdapterOffTeacher, CrossTokenizerTeacher
from opd_lightning.teachers.local import OwnModelTeacher
from opd_lightning.teachers.start import reads_folder
from opd_lightning.types import Author, Rollout

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

MIB = 2**20
ACCUMULATE = "trainer.accumulate_grad_batches"
BUDGET = "data.max_tokens_per_micro_batch"
COUNTED_STEPS = 16  # steps over which authors are averaged; a mix may be random


def step_tokens(probe: Probe) -> dict[str, float]:
    """Estimate rollouts, prompt tokens and response tokens of a step, over all processes.

    The mean response length of each author is that of the probe.
    """
    stream = probe.stream
    authors: Counter[Author] = Counter()
    for step in range(COUNTED_STEPS):
        for several in stream.authors(stream.mix_at(step), step):
            authors.update(several)
    lengths = {a: _length([r for r in probe.trained if r.author is a]) for a in Author}
    lengths[Author.GUIDED] = lengths[Author.STUDENT]
    share = {author: n / COUNTED_STEPS for author, n in authors.items()}
    rollouts = sum(share.values())
    return {
        "rollouts": rollouts,
        "prompt_tokens": rollouts * mean(map(len, stream.prompt_ids)),
        "response_tokens": sum(n * lengths[author] for author, n in share.items()),
        "sampled": sum(n for author, n in share.items() if author is not Author.RECORDED),
    }


def tokens(probe: Probe, counts: dict[str, float]) -> Finding:
    """Report the counts of `step_tokens`, and into how many micro-batches a budget cuts them."""
    found = (
        f"{counts['rollouts']:,.0f} rollouts a step: {counts['prompt_tokens']:,.0f} tokens of "
        f"prompts, {counts['response_tokens']:,.0f} of responses"
    )
    if (most := probe.stream.max_tokens) is not None:
        counts = {**counts, "micro_batches": probe.micro_batches}
        found += (
            f"; {probe.micro_batches} micro-batches of at most {most:,} positions with responses "
            "like the probe's"
        )
    return Finding("ok", "tokens (estimate)", found, values=counts)


def _length(rollouts: list[Rollout]) -> float:
    return mean(len(r.response_ids) for r in rollouts) if rollouts else 0.0


def plan(
    module: DistillationModule,
    data: RolloutDataModule,
    shape: StepShape,
    *,
    micro_batches: int,
    engine: int,
    demonstrator: int,
    on_gpu: bool,
) -> Plan:
    """Describe the configured run, whose models are loaded, or described, in this process.

    Args:
        module: The method.
        data: Its data.
        shape: Sizes of a step.
        micro_batches: Micro-batches of a step.
        engine: Bytes of the student's engine in a process.
        demonstrator: Bytes of the demonstrator's.
        on_gpu: Whether the run is on GPUs.
    """
    student, trainer = module.student, module.trainer
    made = module.configure_optimizers()
    return Plan(
        student=student,
        config=student.source.config,
        optimizer=made[0][0] if isinstance(made, tuple) else made,
        layout=Layout.of(trainer),
        precision=str(trainer.precision),
        checkpointing=student.gradient_checkpointing,
        on_gpu=on_gpu,
        rows=shape.rows_per_batch,
        length=shape.longest,
        response=shape.response,
        micro_batches=micro_batches,
        teachers=[
            TeacherModel(p.model(), sharded=True, offloaded=getattr(p, "offload", False))
            for p in own_models(module)
        ],
        engine=engine,
        demonstrator=demonstrator,
        engine_sleeps=data.engine is not None and data.engine.sleep_while_training,
        pushed=data.engine.weights_dtype if data.engine is not None else None,
        compares_with_start=reads_folder(student) and data.compares_with_start("validate"),
        readings=sum(isinstance(part, AdapterOffTeacher) for part in module.teacher_parts()),
    )


def own_models(module: DistillationModule) -> list[OwnModelTeacher]:
    """Return the teachers that have a model in this process besides the student."""
    parts = module.teacher_parts()
    inner = [p.frozen if isinstance(p, CrossTokenizerTeacher) else p for p in parts]
    return [p for p in inner if isinstance(p, OwnModelTeacher)]


def engine_bytes(
    engine: Engine | None, widths: Widths, weights: int, shape: StepShape, gpu_memory: float | None
) -> int:
    """Estimate the bytes of an engine's weights and KV cache; 0 for a remote engine.

    vLLM uses its share of a GPU, or the KV cache configured for a CPU. The Hugging Face
    engine's cache grows with the rows that it decodes at once.

    Args:
        engine: The engine; None if nothing is sampled.
        widths: Sizes of its model.
        weights: Number of its weights.
        shape: Sizes of a step.
        gpu_memory: Bytes of the GPU; None on CPUs.
    """
    if not isinstance(engine, VLLMEngine | HFEngine):
        return 0
    if isinstance(engine, VLLMEngine) and gpu_memory is not None:
        return int(engine.gpu_memory_utilization * gpu_memory)
    # vLLM's "auto" converts float32 to a 2-byte dtype.
    itemsize = 2 if engine.dtype == "auto" else getattr(torch, engine.dtype).itemsize
    if isinstance(engine, VLLMEngine):
        return itemsize * weights + engine.cpu_kv_cache_gib * 2**30
    rows = min(shape.rows, engine.max_batch_size)
    return itemsize * (weights + rows * shape.longest * widths.cache)


def demonstrator_bytes(
    data: RolloutDataModule, shape: StepShape, gpu_memory: float | None, *, stored: bool = True
) -> int:
    """Estimate the bytes of the demonstrator's engine, as `engine_bytes`; 0 without one.

    Args:
        data: The run's data.
        shape: Sizes of a step.
        gpu_memory: Bytes of the GPU; None on CPUs.
        stored: Whether its weights are there; else config.json is enough.
    """
    if data.teacher is None or not data.mix.teacher:
        return 0
    source = data.teacher.source
    model = empty_causal_lm(source, dtype="bfloat16", stored=stored)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return engine_bytes(data.teacher.engine, Widths.of(source.config), weights, shape, gpu_memory)


def memory(plan: Plan, available: float | None, smaller: str = "", *, program: int = 0) -> Finding:
    """Report the memory of one process on its device, for the longest responses.

    Args:
        plan: The run.
        available: Bytes of the GPU; None on CPUs.
        smaller: Setting that makes micro-batches smaller.
        program: Bytes of the program and its libraries on the same device, as on CPUs.
    """
    predicted = process_memory(plan)
    parts = predicted.peak()
    parts["program"] = program
    total = sum(parts.values())
    found = f"{plan.layout}: about {size(total)} per process: " + ", ".join(
        f"{name.replace('_', ' ')} {size(number)}" for name, number in parts.items() if number
    )
    values = {f"{name}_bytes": float(number) for name, number in parts.items()}
    values["total_bytes"] = float(total)
    if predicted.host:
        values["host_bytes"] = float(predicted.host * plan.layout.per_node)
        found += f"; CPU memory of a node {size(values['host_bytes'])}"
    if plan.widths.assumed:
        found += f"; config.json does not say all, assumed {' and '.join(plan.widths.assumed)}"
    if available is None:
        return Finding("ok", "memory (estimate)", found, values=values)
    found += f"; the GPU has {size(available)}"
    if total <= available:
        return Finding("ok", "memory (estimate)", found, values=values)
    return Finding(
        "warning",
        "memory (estimate)",
        found,
        "a step of the longest responses may not fit",
        f"{smaller}, set student.gradient_checkpointing, or lower the engine's share; "
        "docs/scaling.md says what else",
        values,
    )


def smaller_batches(shape: StepShape) -> str:
    """Name the setting that makes micro-batches smaller."""
    fixed = shape.max_tokens is None
    return f"raise {ACCUMULATE}" if fixed else f"lower {BUDGET}"


def traffic(plan: Plan, weights: int) -> Finding:
    """Report the bytes sent between processes, and those that a push brings to the engine.

    Args:
        plan: The run.
        weights: Number of the weights that are pushed.
    """
    sent = step_traffic(plan)
    values = {f"{name}_bytes": number for name, number in sent.items()}
    values["push_gather_bytes"] = push_traffic(plan)
    itemsize = plan.pushed.itemsize if plan.pushed is not None else 0
    values["push_bytes"] = float(weights * itemsize)
    step = sum(sent.values()) + values["push_gather_bytes"]
    found = f"each process sends {size(step)} a step; " if plan.layout.world > 1 else ""
    found += f"a push brings {size(values['push_bytes'])} to an engine"
    return Finding("ok", "traffic (estimate)", found, values=values)


def time(probe: Probe, counts: dict[str, float]) -> Finding:
    """Estimate the seconds of a step from the counts of `step_tokens`.

    Passes of student and teachers scale per token from the probe. The engine's time per
    decoding step is extrapolated linearly from two numbers of rows to that of a step; the number
    of decoding steps is that of the probe's longest response. A push takes what one took.
    """
    world = probe.stream.ranks.world_size
    per_token = 1 / sum(len(r.prompt_ids) + len(r.response_ids) for r in probe.trained)
    passes = (counts["prompt_tokens"] + counts["response_tokens"]) / world
    own = isinstance(probe.engine, VLLMEngine | HFEngine)  # servers write for all processes
    parts = {"generate": _generate_seconds(probe, counts["sampled"] / (world if own else 1))} | {
        name: seconds * per_token * passes
        for name, seconds in probe.seconds.items()
        if name != "push"
    }
    if probe.data.mix.samples:
        parts["push"] = probe.seconds.get("push", 0.0)
    total = sum(parts.values())
    found = f"about {in_seconds(total)} a step: " + ", ".join(
        f"{name} {in_seconds(seconds)}" for name, seconds in parts.items() if seconds
    )
    values = {f"{name}_seconds": seconds for name, seconds in parts.items()}
    return Finding("ok", "time (estimate)", found, values={**values, "step_seconds": total})


def _generate_seconds(probe: Probe, rows: float) -> float:
    if not probe.generations or not rows:
        return 0.0
    probe.generate(probe.requests[: max(1, len(probe.own) // 4)])
    decoding: dict[int, float] = {}  # least seconds of a decoding step, by number of rows
    for many, longest, seconds in probe.generations:
        decoding[many] = min(decoding.get(many, math.inf), seconds / longest)
    few, many = min(decoding), max(decoding)
    slope = max(0.0, decoding[many] - decoding[few]) / max(1, many - few)
    at_once = min(rows, getattr(probe.engine, "max_batch_size", rows))
    step = decoding[many] + slope * (at_once - many)
    longest = max(g.longest for g in probe.generations if g.rows == many)
    return longest * step * rows / at_once


def in_seconds(number: float) -> str:
    """Format seconds with two digits, or in full from 100 on."""
    return f"{number:.2g} s" if number < 99.5 else f"{number:,.0f} s"


def size(number: float) -> str:
    """Format bytes."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / MIB:.1f} MiB"
