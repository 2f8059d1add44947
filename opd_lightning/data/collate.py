"""Rollouts to tensors: padding and masks are decided here, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_lightning.types import Rollout, RolloutBatch, StepTotals, View


def collate(
    rollouts: Sequence[Rollout], *, totals: StepTotals, temperature: float, pad_id: int
) -> RolloutBatch:
    """One micro-batch, padded on the right.

    Args:
        rollouts: Rows of the batch, in order.
        totals: Sizes of the whole optimiser step.
        temperature: The sampler's.
        pad_id: Fills `input_ids` and `response_ids` where nothing was written.
    """
    prompts = [r.prompt_ids for r in rollouts]
    responses = [r.response_ids for r in rollouts]
    response_ids, response_mask = _pad(responses, pad_id)
    behaviour, _ = _pad([r.behaviour_logprobs for r in rollouts], 0.0)
    return RolloutBatch(
        views={"student": make_view(prompts, responses, pad_id)},
        response_ids=response_ids,
        response_mask=response_mask,
        behaviour_logprobs=behaviour,
        rewards=torch.tensor([r.reward for r in rollouts]),
        group_mean=torch.tensor([r.group_mean for r in rollouts]),
        group_std=torch.tensor([r.group_std for r in rollouts]),
        truncated=torch.tensor([r.stop_reason.is_truncated() for r in rollouts]),
        recorded=any(r.recorded for r in rollouts),
        temperature=temperature,
        totals=totals,
        rollouts=tuple(rollouts),
    )


def make_view(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> View:
    """The responses' own ids after one kind of prompt."""
    input_ids, mask = _pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    return View(
        input_ids=input_ids,
        attention_mask=mask.long(),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
    )


def _pad(rows: Sequence[Sequence[float]], fill: float) -> tuple[Tensor, Tensor]:
    """(`[B, longest]` filled on the right, bool mask of what was there)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    dtype = torch.int64 if isinstance(fill, int) else torch.float32
    padded = torch.full(mask.shape, fill, dtype=dtype)
    padded[mask] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return padded, mask
