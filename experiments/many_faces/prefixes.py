"""Accuracy of a teacher that completes responses started by another model."""

from __future__ import annotations

from collections.abc import Sequence

from opd_lightning.data.prompts import PromptSource
from opd_lightning.models.chat import render
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.seeding import derive_seed
from opd_lightning.verifiers import ExactMatch

BEGINS, ENDS = 0, 1  # coordinates of seeds


def finished(
    *, teacher: str, writer: str, share: float, prompts: str, domain: str, pattern: str, seed: int
) -> dict[str, float]:
    """Return the share of problems that the teacher solves after a part of the writer's response.

    Both sample at temperature 1. The part is the first `share` of the response's tokens, its end
    excluded; at 0 the teacher answers alone.

    Args:
        teacher: Folder of the model that finishes.
        writer: Folder of the model that begins.
        share: In [0, 1].
        prompts: Prompt file with answers.
        domain: Domain of the prompts.
        pattern: Of the answer, see `ExactMatch`.
        seed: Seed of both.
    """
    rows = PromptSource(prompts, domains=[domain]).load()
    source = ModelSource(teacher)
    asked = [render(row, source.tokenizer, {}) for row in rows]
    begun = _responses(writer, asked, seed, BEGINS)
    parts = [ids[: int(share * len(ids))] for ids in begun]
    ends = _responses(teacher, [a + p for a, p in zip(asked, parts, strict=True)], seed, ENDS)
    texts = source.tokenizer.batch_decode([p + e for p, e in zip(parts, ends, strict=True)])
    return {"solved": sum(ExactMatch(pattern).verify(rows, texts)) / len(rows)}


def _responses(path: str, asked: Sequence[list[int]], seed: int, turn: int) -> list[list[int]]:
    """Sample a response to each prompt, without its end."""
    source, engine = ModelSource(path), HFEngine()
    sampling = Sampling(max_new_tokens=40)
    engine.start(source, max_length=max(map(len, asked)) + sampling.max_new_tokens)
    try:
        seeds = [derive_seed(seed, turn, i) for i in range(len(asked))]
        requests = [Request(ids, own) for ids, own in zip(asked, seeds, strict=True)]
        found = engine.generate(requests, sampling)
    finally:
        engine.close()
    return [[i for i in one.response_ids if i not in source.eos_ids] for one in found]
