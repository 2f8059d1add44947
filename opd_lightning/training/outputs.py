"""Checks of what methods, rules, terms and teachers return, whose classes may be a user's.

A tensor of another shape may broadcast, and the run would train on other numbers without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import RunStoppedError
from opd_lightning.rules.base import Rates, Rule, Signal
from opd_lightning.types import RolloutBatch, TokenScores


def checked_tokens(owner: object, call: str, value: Any, like: Tensor) -> Tensor:
    """Return values of tokens, of the shape of `like [B, R]`; those of rows, `[B, 1]`, expanded.

    Raises:
        RunStoppedError: They are no tensor of numbers, or have another shape.
    """
    rows, columns = like.shape
    if isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex():
        if value.shape == like.shape:
            return value
        if value.shape == (rows, 1):
            return value.expand_as(like)
    raise RunStoppedError(
        f"{type(owner).__name__}.{call}: got {described(value)}, expected numbers of the shape "
        f"[{rows}, {columns}]: {rows} rollouts, {columns} response tokens with padding; return one "
        "for every token"
    )


def checked_signal(rule: Rule, result: Any, before: Signal) -> tuple[Signal, Rates]:
    """Return what a rule's `apply` returned for the signal `before`.

    Raises:
        RunStoppedError: It is no pair of a signal and rates, a tensor has another shape, or the
            mask has a token that that of `before` lacks.
    """
    call = f"{type(rule).__name__}.apply"
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or not isinstance(result[0], Signal) or not isinstance(result[1], Mapping):
        got = " and ".join(map(described, result)) if is_pair else described(result)
        raise RunStoppedError(
            f"{call}: got {got}, expected a Signal and a table of rates; "
            "return `signal, {}` where nothing is logged"
        )
    signal, rates = result
    mask = before.mask
    advantage = checked_tokens(rule, "apply, advantage", signal.advantage, mask)
    weight = checked_tokens(rule, "apply, weight", signal.weight, mask)
    kept = signal.mask
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != mask.shape:
        raise RunStoppedError(
            f"{call}, mask: got {described(kept)}, expected bool of the shape {list(mask.shape)}; "
            "make it with `kept(signal, keep)`"
        )
    if kept is not mask and bool((kept & ~mask).any()):
        raise RunStoppedError(
            f"{call}, mask: got tokens that are padding or that an earlier rule left out, expected "
            "a part of `signal.mask`; make it with `kept(signal, keep)`"
        )
    for name, value in rates.items():
        is_rate = isinstance(value, Tensor) and value.shape in (mask.shape, (len(mask), 1))
        if not is_rate:
            raise RunStoppedError(
                f"{call}, rate {name!r}: got {described(value)}, expected a tensor of the shape "
                f"{list(mask.shape)} or [{len(mask)}, 1], whose mean is logged; return one value "
                "for every token or rollout"
            )
    return Signal(advantage=advantage, weight=weight, mask=kept), dict(rates)


def checked_scores(owner: object, call: str, scores: Any, batch: RolloutBatch) -> TokenScores:
    """Return the scores of a teacher.

    Raises:
        RunStoppedError: They are no `TokenScores`, or their log-probs or entropies have another
            shape than the response mask.
    """
    shape = batch.response_mask.shape
    if not isinstance(scores, TokenScores):
        raise RunStoppedError(
            f"{type(owner).__name__}.{call}: got {described(scores)}, expected TokenScores; "
            "`dataclasses.replace` changes those of another teacher"
        )
    for name in ("logprobs", "entropy"):
        value = getattr(scores, name)
        if not isinstance(value, Tensor) or value.shape != shape:
            raise RunStoppedError(
                f"{type(owner).__name__}.{call}, {name}: got {described(value)}, expected the "
                f"shape {list(shape)} of `batch.response_mask`; `batch.unflatten` makes it from "
                "values of the response tokens alone"
            )
    return scores


def described(value: Any) -> str:
    """Return what a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, shape {list(value.shape)}"
    return "nothing (None)" if value is None else f"{type(value).__name__}"
