"""Collation of rollouts to tensors; the only place that decides masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_lightning.models.padding import make_view, pad
from opd_lightning.types import Author, Rollout, RolloutBatch, StepTotals


def collate(
    rollouts: Sequence[Rollout],
    *,
    totals: StepTotals,
    temperature: float,
    pad_id: int,
    top_p: float = 1.0,
    top_k: int = 0,
) -> RolloutBatch:
    """Collate rollouts to one right-padded micro-batch.

    Args:
        rollouts: Rows of the batch, in order.
        totals: Sizes of the whole optimiser step.
        temperature: Sampling temperature.
        pad_id: Fills padded positions of `input_ids` and `response_ids`.
        top_p: Nucleus mass of the student's sampler.
        top_k: Number of candidates of the student's sampler; 0: all.
    """
    prompts = [r.prompt_ids for r in rollouts]
    responses = [r.response_ids for r in rollouts]
    response_ids, response_mask = pad(responses, pad_id)
    # A dropped rollout keeps its row but none of its tokens enters the loss or the totals.
    response_mask &= ~torch.tensor([r.dropped for r in rollouts])[:, None]
    behaviour, _ = pad([r.behaviour_logprobs for r in rollouts], 0.0)
    return RolloutBatch(
        views={"student": make_view(prompts, responses, pad_id)}
        | {
            name: make_view([r.views[name] for r in rollouts], responses, pad_id, prompts)
            for name in rollouts[0].views
        },
        response_ids=response_ids,
        response_mask=response_mask,
        behaviour_logprobs=behaviour,
        rewards=torch.tensor([r.reward for r in rollouts]),
        group_mean=torch.tensor([r.group_mean for r in rollouts]),
        group_std=torch.tensor([r.group_std for r in rollouts]),
        truncated=torch.tensor([r.stop_reason.is_truncated() for r in rollouts]),
        groups=torch.tensor([r.group for r in rollouts]),
        on_policy=torch.tensor([r.author is Author.STUDENT for r in rollouts]),
        demonstrated=torch.tensor([r.author.is_demonstrator() for r in rollouts]),
        temperature=temperature,
        totals=totals,
        rollouts=tuple(rollouts),
        top_p=top_p,
        top_k=top_k,
    )


def count(rollouts: Sequence[Rollout], *, demonstrated: bool) -> tuple[int, int]:
    """Return (response tokens, rollouts) that are not dropped, of one kind of author."""
    kept = [r for r in rollouts if not r.dropped and r.author.is_demonstrator() is demonstrated]
    return sum(len(r.response_ids) for r in kept), len(kept)
