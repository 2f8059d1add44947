"""Choice of one of several responses of the teacher to a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from opd_lightning.types import Author, Rollout


def tied_best(rollouts: Sequence[Rollout]) -> dict[int, list[int]]:
    """Return, by prompt group, the places of the teacher's responses of the highest reward.

    A response without a score ranks behind all others.
    """
    ranked: dict[int, dict[float, list[int]]] = {}
    for place, rollout in enumerate(rollouts):
        if rollout.author is Author.TEACHER:
            reward = -math.inf if math.isnan(rollout.reward) else rollout.reward
            ranked.setdefault(rollout.group, {}).setdefault(reward, []).append(place)
    return {group: by_reward[max(by_reward)] for group, by_reward in ranked.items()}


def keep_best(rollouts: Sequence[Rollout], likelihood: Mapping[int, float]) -> list[Rollout]:
    """Return the rollouts with all but one of the teacher's responses to a prompt dropped.

    The one has the highest reward and, among equals, the highest likelihood.

    Args:
        rollouts: Rollouts of a step, all responses to a prompt among them.
        likelihood: The student's mean log-prob of the tokens, nats, by place; needed for every
            place of `tied_best` that is not alone.
    """
    best = {
        max(tied, key=lambda place: likelihood[place]) if len(tied) > 1 else tied[0]
        for tied in tied_best(rollouts).values()
    }
    return [
        replace(rollout, dropped=True)
        if rollout.author is Author.TEACHER and place not in best
        else rollout
        for place, rollout in enumerate(rollouts)
    ]
