"""Gap between log-probs of Hugging Face generate and of the trainer, on random models."""

from __future__ import annotations

import random
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.head import meters
from benchmarks.training_phase import random_rollout, random_weights
from opd_lightning.data.collate import collate
from opd_lightning.data.engines import push
from opd_lightning.models.causal_lm import Dtype
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rollouts.base import Request
from opd_lightning.types import StepTotals, Totals

# Standard deviation of logits over the vocabulary: entropies of one to three nats, as in language
# models. Plain random weights give nearly uniform distributions, which hide differences.
LOGIT_DEVIATION = 4.4


def measure(
    folder: Path, *, dtype: Dtype, rows: int, prompt: int, tokens: int, device: str
) -> dict[str, Any]:
    """Push a student to the engine, sample from it, and score the samples under bf16-mixed.

    Args:
        folder: Folder of config.json and a tokenizer.
        dtype: Dtype of the engine's copy.
        rows: Number of responses.
        prompt: Tokens of every prompt.
        tokens: Largest number of tokens of a response.
        device: "cuda" or "cpu".
    """
    clock = meters(device)[0]
    student = Student(str(folder))
    engine = HFEngine(dtype=dtype, device=device, max_batch_size=rows)
    with random_weights(device):
        student.load()
        engine.start(student.source, max_length=prompt + tokens)
    config = student.source.config
    spread = config.initializer_range * config.hidden_size**0.5
    student.model.model.norm.weight.data.mul_(LOGIT_DEVIATION / spread)
    began = _now(clock)
    push(student, engine, version=0)
    pushed = _now(clock)
    draw = random.Random(0)
    prompts = [[draw.randrange(2, config.vocab_size) for _ in range(prompt)] for _ in range(rows)]
    completions = engine.generate(
        [Request(ids, seed) for seed, ids in enumerate(prompts)], Sampling(max_new_tokens=tokens)
    )
    generated = _now(clock)
    count = sum(len(c.response_ids) for c in completions)
    totals = StepTotals(step=0, written=Totals(count, rows), demonstrated=Totals(0, 0))
    rollouts = [
        random_rollout(ids, c.response_ids, c.logprobs)
        for ids, c in zip(prompts, completions, strict=True)
    ]
    batch = collate(rollouts, totals=totals, temperature=1.0, pad_id=0).to(torch.device(device))
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        scores = student.score(batch)
    gap = (batch.behaviour_logprobs - scores.logprobs)[batch.response_mask].abs()
    return {
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
        "entropy": float(scores.entropy[batch.response_mask].mean()),
        "tokens": count,
        "push_seconds": pushed - began,
        "generate_seconds": generated - pushed,
        "tokens_per_second": count / (generated - pushed),
    }


def _now(clock: Any) -> float:
    """Return the wall time after the device has finished."""
    clock()
    return perf_counter()
