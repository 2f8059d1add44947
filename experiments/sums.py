"""Sums of the labs: worked solutions, and responses that a model samples."""

from __future__ import annotations

import re
from collections.abc import Sequence

from opd_lightning.lab.arithmetic import Problem
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.seeding import derive_seed
from opd_lightning.types import Prompt

LENGTH = 40  # tokens of a response


def solution(row: Prompt, domain: str) -> str:
    """Return the worked solution of a question such as "347+589="."""
    left, right = re.split(r"[+-]", row.messages[-1]["content"].rstrip("="))
    return Problem(domain, int(left), int(right)).solution


def responses(path: str, asked: Sequence[list[int]], seed: int, turn: int) -> list[list[int]]:
    """Sample a response to each prompt at temperature 1; return its tokens, without the end.

    Args:
        path: Folder of the model.
        asked: Tokens of the prompts.
        seed: With `turn` and the number of the prompt, the seed of a response.
        turn: Number of the call with this seed.
    """
    source, engine = ModelSource(path), HFEngine()
    sampling = Sampling(max_new_tokens=LENGTH)
    engine.start(source, max_length=max(map(len, asked)) + sampling.max_new_tokens)
    try:
        seeds = [derive_seed(seed, turn, i) for i in range(len(asked))]
        requests = [Request(ids, own) for ids, own in zip(asked, seeds, strict=True)]
        found = engine.generate(requests, sampling)
    finally:
        engine.close()
    return [[i for i in one.response_ids if i not in source.eos_ids] for one in found]
