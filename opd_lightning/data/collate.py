"""Rollouts to tensors: padding and masks are decided here, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_lightning.types import Author, Rollout, RolloutBatch, StepTotals, View


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
    # A dropped rollout keeps its row and loses its tokens: no loss, no count.
    response_mask &= ~torch.tensor([r.dropped for r in rollouts])[:, None]
    behaviour, _ = _pad([r.behaviour_logprobs for r in rollouts], 0.0)
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
    )


def make_view(
    prompts: Sequence[list[int] | None],
    responses: list[list[int]],
    pad_id: int,
    fallback: Sequence[list[int]] = (),
) -> View:
    """The responses' own ids after one kind of prompt, or after `fallback` where there is none."""
    available = torch.tensor([p is not None for p in prompts])
    filled = [fallback[i] if p is None else p for i, p in enumerate(prompts)]
    input_ids, mask = _pad([p + r for p, r in zip(filled, responses, strict=True)], pad_id)
    return View(
        input_ids=input_ids,
        attention_mask=mask.long(),
        prompt_lengths=torch.tensor([len(p) for p in filled]),
        available=available,
    )


def count(rollouts: Sequence[Rollout], *, demonstrated: bool) -> tuple[int, int]:
    """(response tokens, rollouts) to learn from, of one kind of author."""
    kept = [r for r in rollouts if not r.dropped and r.author.is_demonstrator() is demonstrated]
    return sum(len(r.response_ids) for r in kept), len(kept)


def _pad(rows: Sequence[Sequence[float]], fill: float) -> tuple[Tensor, Tensor]:
    """(`[B, longest]` filled on the right, bool mask of what was there)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    dtype = torch.int64 if isinstance(fill, int) else torch.float32
    padded = torch.full(mask.shape, fill, dtype=dtype)
    padded[mask] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return padded, mask
