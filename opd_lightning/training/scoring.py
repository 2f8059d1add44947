"""Scoring of a micro-batch by the student and the teachers, without repeated forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lightning.losses.alignment import group_ends, in_groups
from opd_lightning.losses.divergence import Divergence
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.groups import GroupComparison
from opd_lightning.models.head import Comparison
from opd_lightning.models.student import LateComparison, Student, token_scores
from opd_lightning.rules.base import Compare, Scored
from opd_lightning.teachers.base import (
    Ask,
    Groups,
    GroupTeacher,
    provides_distributions,
    provides_top_k,
)
from opd_lightning.timing import StepTimer
from opd_lightning.training.outputs import checked_scores
from opd_lightning.training.top_k_query import TopKQuery, prefetch_top_k
from opd_lightning.types import RolloutBatch, TokenScores

# The comparison whose value is the token loss itself, instead of a policy gradient.
LOSS = "loss"


class BatchScores(NamedTuple):
    """Scores of a micro-batch by all models."""

    scored: Scored  # all scores, detached
    student: TokenScores  # log-probs with their gradient
    values: dict[str, Tensor]  # [B, R] per comparison, with its gradient
    others: Mapping[str, TokenScores]  # teachers' scores as returned, to be reused as `known`


def score_batch(
    student: Student,
    batch: RolloutBatch,
    *,
    asks: Mapping[str, Ask],
    comparisons: Mapping[str, Compare],
    known: Mapping[str, TokenScores],
    top_k: int,
    timer: StepTimer,
    sums_loss: bool = False,
) -> BatchScores:
    """Score a micro-batch with one pass per model, and one of the head for all comparisons.

    Args:
        student: The model that learns.
        batch: The micro-batch.
        asks: Teachers and the views they read, by name. Each pair of teacher and view is scored
            once, under any number of names, and once more if its distribution is compared. A
            teacher of top-k tokens is queried once per comparison.
        comparisons: Functions of whole distributions, by name.
        known: Scores of this batch from an earlier call.
        top_k: Size of the top-k sets of the student and of the teacher named "teacher".
        timer: Timer of the stages "teacher" and "student".
        sums_loss: Whether the loss is expected to be a multiple of the sum of the comparison
            "loss". Affects speed only, not the result.
    """
    comparisons = {name: _of_step(one, batch.totals.step) for name, one in comparisons.items()}
    compared = {
        compare.other: name for name, compare in comparisons.items() if compare.other is not None
    }
    states, others = {}, dict(known)
    groups: dict[str, Groups] = {}
    by_ask: dict[Ask, TokenScores] = {}
    pairs: dict[str, Comparison | LateComparison | GroupComparison] = {}
    with timer.stage("teacher"):
        for name, ask in asks.items():
            if name in compared and isinstance(ask.teacher, GroupTeacher):
                groups[name] = ask.teacher.groups(batch, ask.view)
                others[name] = groups[name].scores
            elif name in compared and provides_distributions(ask.teacher):
                states[name] = ask.teacher.states(batch, ask.view)
            elif name not in compared and name not in others:
                if ask not in by_ask:
                    wanted = _overlap(ask, asks, top_k)
                    found = ask.teacher.score(batch, ask.view, top_k=wanted)
                    by_ask[ask] = checked_scores(ask.teacher, "score", found, batch)
                others[name] = by_ask[ask]
        for name, compare in comparisons.items():
            if compare.other in groups:
                pairs[name] = _of_groups(compare, groups[compare.other], batch)
            elif compare.other is None or compare.other in states:
                pairs[name] = Comparison(
                    states.get(compare.other or ""),
                    compare.function,
                    is_summed=sums_loss and name == LOSS,
                )
            else:
                query = TopKQuery(compare.other, asks[compare.other], batch, top_k, others, timer)
                pairs[name] = query.comparison(compare.function)
    with timer.stage("student"):
        output = student(batch, top_k=top_k, comparisons=pairs)
    for other in states.keys() & compared.keys():
        others[other] = TokenScores.unflatten(output.teachers[compared[other]], batch)
    own = token_scores(output, batch)
    values = {name: batch.unflatten(output.values[name]) for name in pairs}
    detached = {name: value.detach() for name, value in values.items()}
    grouped = _in_groups(own.detach(), others)
    scored = Scored(batch=batch, student=own.detach(), others=grouped, values=detached)
    return BatchScores(scored, own, values, others)


def mean_logprobs(student: Student, batches: Iterable[RolloutBatch]) -> list[float]:
    """Return the student's mean log-prob of each rollout's tokens, nats; 0 without tokens."""
    found: list[float] = []
    with torch.no_grad():
        for batch in batches:
            total = student.score(batch).logprobs.sum(dim=1)
            found += (total / batch.response_mask.sum(dim=1).clamp(min=1)).tolist()
    return found


def _of_step(compare: Compare, step: int) -> Compare:
    """Return a comparison with the function of an optimiser step."""
    function = compare.function
    return (
        compare._replace(function=function.at(step))
        if isinstance(function, Divergence)
        else compare
    )


def _of_groups(compare: Compare, groups: Groups, batch: RolloutBatch) -> GroupComparison:
    """Return the comparison with a teacher of another tokenizer."""
    mask, ends = batch.response_mask, groups.scores.ends
    assert ends is not None
    number = mask.flatten().cumsum(0).view(mask.shape) - 1
    # One more column for tokens without a group.
    number = torch.cat([number, number.new_full((len(number), 1), -1)], dim=1)
    return GroupComparison(
        groups.states,
        partial(compare.function, pairs=groups.pairs),
        number.gather(1, group_ends(ends))[mask],
        groups.given,
    )


def _in_groups(student: TokenScores, others: Mapping[str, TokenScores]) -> dict[str, TokenScores]:
    """Return the log-probs in the finest groups of tokens that all models can score."""
    groupings = [scores.ends for scores in others.values() if scores.ends is not None]
    if not groupings:
        return dict(others)
    ends = torch.stack(groupings).all(dim=0)
    return {
        name: replace(
            scores, logprobs=in_groups(student.logprobs, scores.logprobs, ends), ends=ends
        )
        for name, scores in others.items()
    }


def asked_top_k(
    asks: Mapping[str, Ask], comparisons: Mapping[str, Compare], overlap_top_k: int
) -> dict[str, int]:
    """Return the size of the top-k set requested of each teacher, by name."""
    found = {name: _overlap(ask, asks, overlap_top_k) for name, ask in asks.items()}
    for compare in comparisons.values():
        if compare.other is not None and isinstance(compare.function, TopK):
            found[compare.other] = max(found[compare.other], overlap_top_k, compare.function.k)
    return found


def prefetch_scores(
    asks: Mapping[str, Ask], comparisons: Mapping[str, Compare], batch: RolloutBatch, top_k: int
) -> None:
    """Prefetch the scores of a batch, so that teachers in other processes can begin."""
    compared = {compare.other for compare in comparisons.values()}
    sampled = {ask: None for name, ask in asks.items() if name not in compared}
    for ask in sampled:
        ask.teacher.prefetch(batch, ask.view, top_k=_overlap(ask, asks, top_k))
    for compare in comparisons.values():
        if compare.other is None:
            continue
        teacher = asks[compare.other].teacher
        if provides_top_k(teacher) and not provides_distributions(teacher):
            prefetch_top_k(asks[compare.other], batch, compare.function, top_k)


def _overlap(ask: Ask, asks: Mapping[str, Ask], top_k: int) -> int:
    """Return `top_k` for the teacher named "teacher", whose overlap is logged, and 0 for others."""
    return top_k if ask == asks.get("teacher") else 0
