"""Helpers of the rules: argument checks, and changes of a signal that respect its mask.

A change applies only to the tokens that earlier rules kept, the selected tokens. So padding, which
has arbitrary values, never enters a result.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.rules.base import Rule, Scored, Signal
from opd_lightning.seeding import TOKEN_CHOICE, derive_seed
from opd_lightning.types import RolloutBatch


def check(rule: Rule, field: str, ok: bool, expected: str) -> None:
    """Raise UserError about a rule's field unless `ok`. Write `ok` so that NaN fails it."""
    if not ok:
        got = getattr(rule, field)
        raise UserError(f"{type(rule).__name__}: {field} is {got!r}, expected {expected}")


def with_advantage(signal: Signal, advantage: Tensor) -> Signal:
    """Return the signal with another advantage, `[B, R]` or broadcast to it."""
    return replace(signal, advantage=torch.where(signal.mask, advantage, signal.advantage))


def weighed(signal: Signal, factor: Tensor) -> Signal:
    """Return the signal with its weight times a factor, `[B, R]` or broadcast to it."""
    return replace(signal, weight=torch.where(signal.mask, signal.weight * factor, signal.weight))


def kept(signal: Signal, keep: Tensor) -> Signal:
    """Return the signal without tokens where `keep` (bool, broadcast to `[B, R]`) is False."""
    return replace(signal, mask=signal.mask & keep)


def rate(scored: Scored, values: Tensor) -> Tensor:
    """Return values, broadcast to `[B, R]`, as a rate: 0 where there is no response token."""
    values = values.to(scored.student.logprobs.dtype)
    return torch.where(scored.batch.response_mask, values, 0.0)


def is_correct(scored: Scored, threshold: float) -> Tensor:
    """Return `[B, 1]` bool: True where the score reaches the threshold; False without a score."""
    return (scored.batch.rewards >= threshold)[:, None]


def is_wrong(scored: Scored, threshold: float) -> Tensor:
    """Return `[B, 1]` bool: True where the score is below the threshold; False without a score."""
    return (scored.batch.rewards < threshold)[:, None]


def step_mean(observed: Tensor | None) -> Tensor:
    """Return the step's mean from rows of (sum, count), `[M, 2]`; 1 if the sum is not positive."""
    assert observed is not None, "step-wide"
    total, count = observed.sum(dim=0)
    return torch.where(total > 0, total / count, 1.0)


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the smallest value at or above the interpolated q-quantile of `[N]`; +inf if N is 0.

    No value lies between the two, so comparing with either keeps the same tokens. torch.quantile
    supports at most 2**24 values.
    """
    if not len(values):
        return values.new_tensor(math.inf)
    rank = math.ceil(q * (len(values) - 1) - 1e-9)  # (1 - 0.7) * 10 is a little more than 3
    return values.kthvalue(rank + 1).values


def uniform_draws(
    batch: RolloutBatch,
    seed: int,
    *,
    per: Literal["token", "rollout"] = "token",
    purpose: int = TOKEN_CHOICE,
) -> Tensor:
    """Return uniform numbers in [0, 1), `[B, R]` float32; 1 at padding.

    They follow from the purpose (see `seeding`), the seed, the step, the prompt's place in the run
    and the response, and so do not depend on micro-batches, ranks or restarts.
    """
    mask, ids, groups = (x.cpu() for x in (batch.response_mask, batch.response_ids, batch.groups))
    draws = torch.ones(mask.shape)
    for row, group in enumerate(groups.tolist()):
        own = derive_seed(purpose, seed, batch.totals.step, group, *ids[row][mask[row]].tolist())
        count = int(mask[row].sum()) if per == "token" else 1
        draws[row, mask[row]] = torch.rand(count, generator=torch.Generator().manual_seed(own))
    return draws.to(batch.response_mask.device)
