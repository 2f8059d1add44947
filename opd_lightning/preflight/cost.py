"""What a step will cost: tokens, memory of a process, seconds.  Estimates, but for the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from opd_lightning.head import MAX_BLOCK_ELEMENTS, MAX_CHUNK_ELEMENTS
from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.probe import Probe
from opd_lightning.rollouts import HFEngine, VLLMEngine
from opd_lightning.rollouts.checks import parameter_shapes
from opd_lightning.sharding import holders
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.types import Author, Rollout

MIB = 2**20
COUNTED_STEPS = 16  # whose authors are averaged: the mix may toss coins


def step_tokens(probe: Probe) -> dict[str, float]:
    """Of a step, over all processes: rollouts, tokens of their prompts, tokens of the responses.

    Responses are taken to be as long, on average, as those of the probe, by author.
    """
    stream, prompts = probe.stream, probe.data.prompts_per_step
    authors: Counter[Author] = Counter()
    for step in range(COUNTED_STEPS):
        mix = stream.mix_at(step)
        for several in mix.authors(stream.seed, step, prompts, stream.samples_per_prompt):
            authors.update(several)
    seen = [*(probe.own if probe.data.mix.samples else []), *probe.given]
    lengths = {a: _length([r for r in seen if r.author is a]) for a in Author}
    lengths[Author.GUIDED] = lengths[Author.STUDENT]
    share = {author: n / COUNTED_STEPS for author, n in authors.items()}
    rollouts = sum(share.values())
    return {
        "rollouts": rollouts,
        "prompt_tokens": rollouts * mean(map(len, stream.prompt_ids)),
        "response_tokens": sum(n * lengths[author] for author, n in share.items()),
        "sampled": sum(n for author, n in share.items() if author is not Author.RECORDED),
    }


def tokens(counts: dict[str, float]) -> Finding:
    """`counts` are of `step_tokens`."""
    found = (
        f"{counts['rollouts']:,.0f} rollouts a step: {counts['prompt_tokens']:,.0f} tokens of "
        f"prompts, {counts['response_tokens']:,.0f} of responses"
    )
    return Finding("ok", "tokens (estimate)", found, values=counts)


def _length(rollouts: list[Rollout]) -> float:
    return mean(len(r.response_ids) for r in rollouts) if rollouts else 0.0


def student_bytes(parameters: Iterable[Tensor], optimizer: Optimizer) -> dict[str, int]:
    """Exactly: weights W, gradients G of those that train, and the optimiser's states.

    States are `c` copies of G in its dtype: 2 for Adam and its kin (3 with amsgrad), which also
    count steps in one float32 a tensor; 1 for a momentum; else 0.
    """
    tensors = list(parameters)
    trained = [t for t in tensors if t.requires_grad]
    defaults: dict[str, Any] = optimizer.defaults
    adam = "betas" in defaults
    copies = 2 + bool(defaults.get("amsgrad")) if adam else int(bool(defaults.get("momentum")))
    gradients = _bytes(trained)
    counters = 4 * len(trained) if adam else 0
    return {
        "weights": _bytes(tensors),
        "gradients": gradients,
        "optimizer": copies * gradients + counters,
    }


def activation_bytes(
    config: Any, tokens: int, itemsize: int, *, checkpointing: bool
) -> dict[str, int]:
    """What a micro-batch of `tokens` (padding included) keeps for its backward pass; an estimate.

    Per token and layer a Llama-like block keeps `8 H + 4 A + 4 K + 4 I` elements: its residuals
    and norms (H, hidden size), queries and attention's output with their norms (A, heads x head
    size), keys and values (K), gate, up and their product (I, intermediate size). With gradient
    checkpointing it is `H` per token and layer, and one layer in full. The head keeps the hidden
    states and, whatever the number of tokens, one chunk of logits and four blocks that are read
    from it.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    queries, keys = text.num_attention_heads * _head_size(text), _key_width(text)
    block = 8 * hidden + 4 * queries + 4 * keys + 4 * text.intermediate_size
    per_token = layers * hidden + block if checkpointing else layers * block
    logits = tokens * text.vocab_size
    head = min(logits, MAX_CHUNK_ELEMENTS) * itemsize + 4 * 4 * min(logits, MAX_BLOCK_ELEMENTS)
    return {"activations": tokens * (per_token + hidden) * itemsize, "head": head}


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_width(text: Any) -> int:
    return getattr(text, "num_key_value_heads", text.num_attention_heads) * _head_size(text)


def engine_bytes(probe: Probe) -> dict[str, int]:
    """The engine's copy of the weights and its KV cache; nothing of one that is elsewhere.

    vLLM takes its share of a GPU, or the KV cache that it is given on a CPU. The Hugging Face
    engine's cache grows with the rows that it decodes at once.
    """
    engine, source = probe.engine, probe.module.student.source
    if not isinstance(engine, VLLMEngine | HFEngine):
        return {}
    if isinstance(engine, VLLMEngine) and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(probe.module.device).total_memory
        return {"engine": int(engine.gpu_memory_utilization * total)}
    # vLLM's "auto" halves what is not half already.
    itemsize = 2 if engine.dtype == "auto" else getattr(torch, engine.dtype).itemsize
    copy = itemsize * sum(shape.numel() for shape in parameter_shapes(source).values())
    if isinstance(engine, VLLMEngine):
        return {"engine": copy + engine.cpu_kv_cache_gib * 2**30}
    text = source.config.get_text_config()
    rows = min(probe.rows_per_batch * probe.stream.micro_batches, engine.max_batch_size)
    per_token = 2 * text.num_hidden_layers * _key_width(text) * itemsize
    return {"engine": copy + rows * _longest(probe) * per_token}


def _longest(probe: Probe) -> int:
    """Tokens of the longest sequence that may come."""
    return max(map(len, probe.stream.prompt_ids)) + probe.sampling.max_new_tokens


def teacher_bytes(probe: Probe) -> int:
    """Weights of the teachers in this process; what shares the student's counts once, as its."""
    own = {id(parameter) for parameter in probe.module.student.parameters()}
    parts = [part for teacher in probe.module.teachers() for part in teacher.parts()]
    models = [p.model() for p in parts if isinstance(p, LocalTeacher) and hasattr(p, "model")]
    unique = {id(p): p for model in models for p in model.parameters() if id(p) not in own}
    return _bytes(unique.values())


def memory(probe: Probe, optimizer: Optimizer) -> Finding:
    """Of one process on its device, all in memory at once, for the longest responses.

    Sharded weights, their gradients and states are divided by the processes that share them.
    """
    student, shards = probe.module.student, holders(probe.module.trainer.strategy)
    weights = student_bytes(student.parameters(), optimizer) | {"teachers": teacher_bytes(probe)}
    low = probe.module.trainer.precision != "32-true" or student.dtype != "float32"
    parts: dict[str, int] = {
        **{name: size // shards for name, size in weights.items()},
        **engine_bytes(probe),
        **activation_bytes(
            student.source.config,
            probe.rows_per_batch * _longest(probe),
            2 if low else 4,
            checkpointing=student.gradient_checkpointing,
        ),
    }
    total = sum(parts.values())
    found = f"about {_size(total)} per process: " + ", ".join(
        f"{name} {_size(size)}" for name, size in parts.items() if size
    )
    values = {f"{name}_bytes": float(size) for name, size in parts.items()}
    values["total_bytes"] = float(total)
    device = probe.module.device
    if device.type != "cuda":
        return Finding("ok", "memory (estimate)", found, values=values)
    room = torch.cuda.get_device_properties(device).total_memory
    found += f"; the GPU has {_size(room)}"
    if total <= room:
        return Finding("ok", "memory (estimate)", found, values=values)
    return Finding(
        "warning",
        "memory (estimate)",
        found,
        "a step of the longest responses may not fit",
        "raise trainer.accumulate_grad_batches, set student.gradient_checkpointing, or lower the "
        "engine's share",
        values,
    )


def time(probe: Probe, counts: dict[str, float]) -> Finding:
    """Seconds of a step; `counts` are of `step_tokens`.

    The student's and the teachers' passes take what they took per token of the probe. Of the
    engine, the time of one decoding step is continued in a straight line from two numbers of rows
    to those of a step, and there are as many as in the probe's longest response.
    """
    world = probe.stream.ranks.world_size
    seen = [*(probe.own if probe.data.mix.samples else []), *probe.given]
    per_token = 1 / sum(len(r.prompt_ids) + len(r.response_ids) for r in seen)
    passes = (counts["prompt_tokens"] + counts["response_tokens"]) / world
    parts = {"generate": _generate_seconds(probe, counts["sampled"] / world)} | {
        name: seconds * per_token * passes for name, seconds in probe.seconds.items()
    }
    total = sum(parts.values())
    found = f"about {total:.2g} s a step: " + ", ".join(
        f"{name} {seconds:.2g} s" for name, seconds in parts.items() if seconds
    )
    values = {f"{name}_seconds": seconds for name, seconds in parts.items()}
    return Finding("ok", "time (estimate)", found, values={**values, "step_seconds": total})


def _generate_seconds(probe: Probe, rows: float) -> float:
    if not probe.generations or not rows:
        return 0.0
    probe.generate(probe.requests[: max(1, len(probe.own) // 4)])
    decoding: dict[int, float] = {}  # seconds of a decoding step by rows, the quickest
    for many, longest, seconds in probe.generations:
        decoding[many] = min(decoding.get(many, math.inf), seconds / longest)
    few, many = min(decoding), max(decoding)
    slope = max(0.0, decoding[many] - decoding[few]) / max(1, many - few)
    at_once = min(rows, getattr(probe.engine, "max_batch_size", rows))
    step = decoding[many] + slope * (at_once - many)
    longest = max(g.longest for g in probe.generations if g.rows == many)
    return longest * step * rows / at_once


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / MIB:.1f} MiB"
