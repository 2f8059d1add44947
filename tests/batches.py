"""Rollouts and micro-batches for tests."""

from collections.abc import Mapping

from opd_lightning.data.collate import collate, count
from opd_lightning.types import (
    Author,
    Prompt,
    Rollout,
    RolloutBatch,
    StepTotals,
    StopReason,
    Totals,
)


def make_rollout(
    response_ids: list[int],
    *,
    prompt_ids: list[int] | None = None,
    reward: float = 0.0,
    group_mean: float = 0.0,
    group_std: float = 0.0,
    truncated: bool = False,
    domain: str = "default",
    author: Author = Author.STUDENT,
    dropped: bool = False,
    views: dict[str, list[int] | None] | None = None,
    group: int = 0,
    reward_parts: Mapping[str, float] | None = None,
) -> Rollout:
    return Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "?"},), domain=domain),
        prompt_ids=prompt_ids or [3],
        views=views or {},
        group=group,
        response_ids=response_ids,
        behaviour_logprobs=[-0.5] * len(response_ids),
        stop_reason=StopReason.LENGTH if truncated else StopReason.EOS,
        text="x" * len(response_ids),
        reward=reward,
        group_mean=group_mean,
        group_std=group_std,
        author=author,
        dropped=dropped,
        policy_version=0,
        reward_parts=reward_parts or {},
    )


def make_batch(
    rollouts: list[Rollout], *, temperature: float = 0.7, pad_id: int = 0
) -> RolloutBatch:
    written, demonstrated = (Totals(*count(rollouts, demonstrated=kind)) for kind in (False, True))
    totals = StepTotals(step=0, written=written, demonstrated=demonstrated)
    return collate(rollouts, totals=totals, temperature=temperature, pad_id=pad_id)
