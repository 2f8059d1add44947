"""Where in its responses a model makes the first mistake."""

from __future__ import annotations

from statistics import mean

from experiments.sums import responses, solution
from opd_lightning.data.prompts import PromptSource
from opd_lightning.models.chat import render
from opd_lightning.models.source import ModelSource


def first_mistakes(
    *, student: str, positions: tuple[int, int], prompts: str, domain: str, seed: int
) -> dict[str, float]:
    """Return `mistakes`, the share of responses whose first mistake is at some positions.

    A mistake is a token that differs from that of the worked solution, or a response that ends
    earlier or later. Responses are sampled at temperature 1.

    Args:
        student: Folder of the model.
        positions: First position of the response, from 0, and the one behind the last.
        prompts: Prompt file.
        domain: Domain of the prompts, which are those of the lab's `arithmetic`.
        seed: Seed of the responses.
    """
    rows = PromptSource(prompts, domains=[domain]).load()
    tokenizer = ModelSource(student).tokenizer
    found = responses(student, [render(row, tokenizer, {}) for row in rows], seed, 0)
    worked = [tokenizer(solution(row, domain), add_special_tokens=False).input_ids for row in rows]
    begin, end = positions
    return {
        "mistakes": mean(
            own != right and begin <= _agreeing(own, right) < end
            for own, right in zip(found, worked, strict=True)
        )
    }


def _agreeing(own: list[int], right: list[int]) -> int:
    """Return the number of tokens at the beginning that are the same."""
    pairs = enumerate(zip(own, right, strict=False))
    shorter = min(len(own), len(right))
    return next((i for i, (one, other) in pairs if one != other), shorter)
