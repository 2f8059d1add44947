"""Rollouts as plain data, for checkpoints that are loaded without running pickled code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from opd_lightning.types import Author, Prompt, Rollout, StopReason

# What a rollout's position in the run's order says already.
_KNOWN = ("prompt", "prompt_ids")


def to_plain(rollouts: Iterable[Rollout]) -> list[dict[str, Any]]:
    """Every field but the prompt, in numbers, strings, lists and dicts."""
    names = [f.name for f in fields(Rollout) if f.name not in _KNOWN]
    plain = [{name: getattr(rollout, name) for name in names} for rollout in rollouts]
    for row in plain:
        row |= {"stop_reason": row["stop_reason"].value, "author": row["author"].value}
        row["views"] = dict(row["views"])
    return plain


def from_plain(
    plain: Iterable[dict[str, Any]], prompt_at: Callable[[int], tuple[Prompt, list[int]]]
) -> list[Rollout]:
    """The rollouts again; `prompt_at` knows the prompt and its ids at a position of the order."""
    rollouts = []
    for row in plain:
        prompt, prompt_ids = prompt_at(row["group"])
        enums = {"stop_reason": StopReason(row["stop_reason"]), "author": Author(row["author"])}
        rollouts.append(Rollout(prompt=prompt, prompt_ids=prompt_ids, **{**row, **enums}))
    return rollouts
