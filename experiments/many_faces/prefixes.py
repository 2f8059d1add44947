"""Accuracy of a teacher that completes responses started by another model."""

from __future__ import annotations

from statistics import mean

from experiments.sums import LENGTH, responses, solution
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.models.chat import render
from opd_lightning.models.source import ModelSource
from opd_lightning.verifiers import ExactMatch

BEGINS, ENDS = 0, 1  # coordinates of seeds


def finished(
    *, teacher: str, writer: str, share: float, prompts: str, domain: str, seed: int
) -> dict[str, float]:
    """Return the share of sums that the teacher solves after a part of the writer's response.

    Both sample at temperature 1. The part is the first `share` of the response's tokens, its end
    excluded; at 0 the teacher answers alone. Part and rest have at most as many tokens as a whole
    response.

    Args:
        teacher: Folder of the model that finishes.
        writer: Folder of the model that begins.
        share: In [0, 1].
        prompts: Prompt file with answers.
        domain: Domain of the prompts, which are those of the lab's `arithmetic`.
        seed: Seed of both.

    Returns:
        `solved`; `right`, the share of parts that the worked solution begins with; and
        `solved_after_right`, of these, if there are any.
    """
    rows = PromptSource(prompts, domains=[domain]).load()
    source = ModelSource(teacher)
    asked = [render(row, source.tokenizer, {}) for row in rows]
    begun = responses(writer, asked, seed, BEGINS)
    parts = [ids[: int(share * len(ids))] for ids in begun]
    ends = responses(teacher, [a + p for a, p in zip(asked, parts, strict=True)], seed, ENDS)
    whole = [(p + e)[:LENGTH] for p, e in zip(parts, ends, strict=True)]
    decode = source.tokenizer.batch_decode
    solved = ExactMatch(ANSWER_PATTERN).verify(rows, decode(whole))
    begins = zip(rows, decode(parts), strict=True)
    right = [solution(row, domain).startswith(part) for row, part in begins]
    found = {"solved": mean(solved), "right": mean(right)}
    if any(right):
        found["solved_after_right"] = mean(
            score for score, r in zip(solved, right, strict=True) if r
        )
    return found
