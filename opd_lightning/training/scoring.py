"""Asking the student and everybody else about a micro-batch, each no more often than needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lightning.losses.alignment import in_groups
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.head import Comparison
from opd_lightning.models.student import LateComparison, Student
from opd_lightning.rules.base import Compare, Scored
from opd_lightning.teachers.base import Ask, DistributionTeacher, TopKTeacher
from opd_lightning.timing import StepTimer
from opd_lightning.training.top_k_asker import TopKAsker, announce_likeliest
from opd_lightning.types import RolloutBatch, TokenScores

# The comparison whose value is the token loss itself, instead of a policy gradient.
LOSS = "loss"


class Answers(NamedTuple):
    """What everybody said."""

    scored: Scored  # everything, detached
    student: TokenScores  # log-probs with their gradient
    values: dict[str, Tensor]  # [B, R] per comparison, with its gradient
    others: Mapping[str, TokenScores]  # as they were told, for another look at the batch


def ask_everybody(
    student: Student,
    batch: RolloutBatch,
    *,
    asks: Mapping[str, Ask],
    comparisons: Mapping[str, Compare],
    known: Mapping[str, TokenScores],
    top_k: int,
    timer: StepTimer,
) -> Answers:
    """One pass of every model that is asked, and one of the head for all comparisons.

    Args:
        student: The model that learns.
        batch: The micro-batch.
        asks: Whom to ask under which view, by name. The same teacher under the same view is run
            once, whatever it is called, and once more if its distribution is compared. One that
            knows only some tokens is asked once per comparison.
        comparisons: Functions of whole distributions, by name.
        known: Scores from an earlier look at this batch.
        top_k: Size of the top-k sets of the student and of the one called "teacher".
        timer: Charged for "teacher" and "student".
    """
    compared = {wish.other: name for name, wish in comparisons.items() if wish.other is not None}
    states, others = {}, dict(known)
    asked: dict[Ask, TokenScores] = {}
    pairs: dict[str, Comparison | LateComparison] = {}
    with timer.stage("teacher"):
        for name, ask in asks.items():
            if name in compared and isinstance(ask.teacher, DistributionTeacher):
                states[name] = ask.teacher.states(batch, ask.view)
            elif name not in compared and name not in others:
                if ask not in asked:
                    wanted = _overlap(ask, asks, top_k)
                    asked[ask] = ask.teacher.score(batch, ask.view, top_k=wanted)
                others[name] = asked[ask]
        for name, wish in comparisons.items():
            if wish.other is None or wish.other in states:
                pairs[name] = Comparison(states.get(wish.other or ""), wish.function)
            else:
                asker = TopKAsker(wish.other, asks[wish.other], batch, top_k, others, timer)
                pairs[name] = asker.comparison(wish.function)
    with timer.stage("student"):
        answers = student(batch, top_k=top_k, comparisons=pairs)
    for other in states.keys() & compared.keys():
        others[other] = TokenScores.unflatten(answers.teachers[compared[other]], batch)
    own = TokenScores.unflatten(answers.student, batch)
    values = {name: batch.unflatten(value) for name, value in answers.values.items()}
    detached = {name: value.detach() for name, value in values.items()}
    grouped = _in_groups(own.detach(), others)
    scored = Scored(batch=batch, student=own.detach(), others=grouped, values=detached)
    return Answers(scored, own, values, others)


def _in_groups(student: TokenScores, others: Mapping[str, TokenScores]) -> dict[str, TokenScores]:
    """Everybody's log-probs in the finest groups of tokens that all of them can speak of."""
    told = [scores.ends for scores in others.values() if scores.ends is not None]
    if not told:
        return dict(others)
    ends = torch.stack(told).all(dim=0)
    return {
        name: replace(
            scores, logprobs=in_groups(student.logprobs, scores.logprobs, ends), ends=ends
        )
        for name, scores in others.items()
    }


def asked_top_k(
    asks: Mapping[str, Ask], comparisons: Mapping[str, Compare], overlap_top_k: int
) -> dict[str, int]:
    """How many of its likeliest tokens everybody is asked for, by name."""
    found = {name: _overlap(ask, asks, overlap_top_k) for name, ask in asks.items()}
    for wish in comparisons.values():
        if wish.other is not None and isinstance(wish.function, TopK):
            found[wish.other] = max(found[wish.other], overlap_top_k, wish.function.k)
    return found


def announce(
    asks: Mapping[str, Ask], comparisons: Mapping[str, Compare], batch: RolloutBatch, top_k: int
) -> None:
    """Tell every teacher what it will be asked, so that one elsewhere may begin."""
    compared = {wish.other for wish in comparisons.values()}
    sampled = {ask: None for name, ask in asks.items() if name not in compared}
    for ask in sampled:
        ask.teacher.prefetch(batch, ask.view, top_k=_overlap(ask, asks, top_k))
    for wish in comparisons.values():
        if wish.other is not None and isinstance(asks[wish.other].teacher, TopKTeacher):
            announce_likeliest(asks[wish.other], batch, wish.function, top_k)


def _overlap(ask: Ask, asks: Mapping[str, Ask], top_k: int) -> int:
    """The one called "teacher" tells its top-k set, for the overlap that is logged."""
    return top_k if ask == asks.get("teacher") else 0
