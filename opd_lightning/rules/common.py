"""What the rules share: checks of their knobs, and changes that respect the mask.

A change reaches only tokens that still take part. So padding, which may hold anything, is never
read into a result, and a rule sees what the rules listed before it left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.rules.base import Rule, Scored, Signal


def check(rule: Rule, field: str, ok: bool, expected: str) -> None:
    """Refuse a rule's knob. Write `ok` so that NaN fails it."""
    if not ok:
        got = getattr(rule, field)
        raise UserError(f"{type(rule).__name__}: {field} is {got!r}, expected {expected}")


def with_advantage(signal: Signal, advantage: Tensor) -> Signal:
    """Another advantage, `[B, R]` or broadcast to it."""
    return replace(signal, advantage=torch.where(signal.mask, advantage, signal.advantage))


def weighed(signal: Signal, factor: Tensor) -> Signal:
    """The weight times a factor, `[B, R]` or broadcast to it."""
    return replace(signal, weight=torch.where(signal.mask, signal.weight * factor, signal.weight))


def kept(signal: Signal, keep: Tensor) -> Signal:
    """Without the tokens that `keep` (bool, `[B, R]` or broadcast to it) leaves out."""
    return replace(signal, mask=signal.mask & keep)


def rate(scored: Scored, values: Tensor) -> Tensor:
    """Values, `[B, R]` or broadcast to it, as a rate: 0 where there is no response token."""
    values = values.to(scored.student.logprobs.dtype)
    return torch.where(scored.batch.response_mask, values, 0.0)


def is_correct(scored: Scored, threshold: float) -> Tensor:
    """`[B, 1]` bool: the verifier's score reaches the threshold; False without a score."""
    return (scored.batch.rewards >= threshold)[:, None]


def is_wrong(scored: Scored, threshold: float) -> Tensor:
    """`[B, 1]` bool: the verifier's score is below the threshold; False without a score."""
    return (scored.batch.rewards < threshold)[:, None]


def step_mean(observed: Tensor | None) -> Tensor:
    """A mean from the whole step's rows of (sum, count), `[M, 2]`; 1 where nothing was counted."""
    assert observed is not None, "step-wide"
    total, count = observed.sum(dim=0)
    return torch.where(total > 0, total / count, 1.0)
