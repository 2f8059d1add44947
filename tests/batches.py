"""Rollouts and micro-batches for tests."""

from opd_lightning.data.collate import collate
from opd_lightning.types import Prompt, Rollout, RolloutBatch, StepTotals, StopReason


def make_rollout(
    response_ids: list[int],
    *,
    prompt_ids: list[int] | None = None,
    reward: float = 0.0,
    group_mean: float = 0.0,
    group_std: float = 0.0,
    truncated: bool = False,
    domain: str = "default",
) -> Rollout:
    return Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "?"},), domain=domain),
        prompt_ids=prompt_ids or [3],
        response_ids=response_ids,
        behaviour_logprobs=[-0.5] * len(response_ids),
        stop_reason=StopReason.LENGTH if truncated else StopReason.EOS,
        text="x" * len(response_ids),
        reward=reward,
        group_mean=group_mean,
        group_std=group_std,
        recorded=False,
        policy_version=0,
    )


def make_batch(
    rollouts: list[Rollout], *, temperature: float = 0.7, pad_id: int = 0
) -> RolloutBatch:
    totals = StepTotals(
        step=0, tokens=sum(len(r.response_ids) for r in rollouts), sequences=len(rollouts)
    )
    return collate(rollouts, totals=totals, temperature=temperature, pad_id=pad_id)
