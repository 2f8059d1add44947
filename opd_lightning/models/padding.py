"""Right padding of rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_lightning.types import View


def pad(rows: Sequence[Sequence[float]], fill: float) -> tuple[Tensor, Tensor]:
    """Return rows padded on the right with `fill`, `[B, longest]`, and the bool mask of values.

    The dtype is int64 if `fill` is an int, float32 otherwise.
    """
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    dtype = torch.int64 if isinstance(fill, int) else torch.float32
    padded = torch.full(mask.shape, fill, dtype=dtype)
    padded[mask] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return padded, mask


def make_view(
    prompts: Sequence[list[int] | None],
    responses: Sequence[list[int]],
    pad_id: int,
    fallback: Sequence[list[int]] = (),
) -> View:
    """Build the view of responses after `prompts`, or after `fallback` where one is None."""
    available = torch.tensor([p is not None for p in prompts])
    filled = [fallback[i] if p is None else p for i, p in enumerate(prompts)]
    input_ids, mask = pad([p + r for p, r in zip(filled, responses, strict=True)], pad_id)
    return View(
        input_ids=input_ids,
        attention_mask=mask.long(),
        prompt_lengths=torch.tensor([len(p) for p in filled]),
        available=available,
    )
