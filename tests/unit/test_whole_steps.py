"""Signals that need the whole step: how often the student is read for them, and their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.models.student import Student
from opd_lightning.rules import EntropyBonus, IcePop, PhasedFloor, Rule, StabilityWeight
from opd_lightning.rules.base import Scored
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.teachers.base import Ask
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.scoring import BatchScores
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.toy import score_of

ROWS, LENGTH = 6, 3
BATCH = make_batch([make_rollout([5, 6, 7], group=row) for row in range(ROWS)])
TEACHER = FrozenTeacher("nowhere")


class Given(ComposedMethod):
    """Method whose models' scores are given, `[ROWS, LENGTH]`."""

    def __init__(self, logprobs: Tensor, **more: Any) -> None:
        super().__init__(Student("nowhere"), **more)
        self.logprobs = logprobs
        self.reads: list[tuple[bool, int]] = []  # with a gradient, rows
        plugin = SimpleNamespace(forward_context=nullcontext)
        self.trainer: Any = SimpleNamespace(precision_plugin=plugin)

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(TEACHER, "student")}

    def _score(self, batch: RolloutBatch, known: Any = None) -> BatchScores:
        self.reads.append((torch.is_grad_enabled(), len(batch.groups)))
        own = self.logprobs[batch.groups]
        entropy = -own.detach() / 2
        student = replace(score_of(own, entropy), logprobs=own)
        teacher = torch.linspace(-4, 0, ROWS * LENGTH).view(ROWS, LENGTH).flip(0)[batch.groups]
        others = {"teacher": score_of(teacher)}
        scored = Scored(batch=batch, student=student.detach(), others=others, values={})
        return BatchScores(scored, student, dict.fromkeys(self.all_comparisons(), own), others)


def gradient(sizes: Sequence[int], rules: Sequence[Rule], **more: Any) -> tuple[Tensor, Any]:
    """Return the gradient of a step's loss in micro-batches of so many rows, and what was read."""
    torch.manual_seed(0)
    logprobs = (-3 * torch.rand(ROWS, LENGTH)).requires_grad_()
    method = Given(logprobs, rules=list(rules), **more)
    batches = [BATCH.select(rows.tolist()) for rows in torch.arange(ROWS).split([*sizes])]
    method.prepare_step(batches)
    for batch in batches:
        method.loss(batch).backward()
    assert logprobs.grad is not None
    return logprobs.grad * method.loss_factor(), method.reads


STEP_WIDE = [StabilityWeight(tau=0.5), PhasedFloor(mixing=0.3, switch_step=0)]


@pytest.mark.parametrize("sizes", [(1, 2, 3), (3, 3), (5, 1)])
def test_the_first_micro_batch_is_read_once(sizes: tuple[int, ...]) -> None:
    """The others twice; the loss is that of a step of one micro-batch, which is read once."""
    whole, read = gradient([ROWS], STEP_WIDE, aggregation="mask-mean")
    assert read == [(True, ROWS)]
    assert (whole == 0).any()
    assert (whole != 0).any()
    split, read = gradient(sizes, STEP_WIDE, aggregation="mask-mean")
    torch.testing.assert_close(split, whole)
    assert read == [(False, n) for n in sizes[1:]] + [(True, n) for n in sizes]


NEVER, ALWAYS = PhasedFloor(switch_step=1), PhasedFloor(switch_step=0)  # until step 1 a floor


@pytest.mark.parametrize(
    ("rules", "more", "is_read"),
    [
        ([], {}, False),
        ([NEVER], {}, False),
        ([ALWAYS], {}, True),
        # The loss is divided at the step's end.
        ([StabilityWeight(tau=0.5)], {}, False),
        ([StabilityWeight(tau=0.5)], {"aggregation": "seq-mean-token-mean"}, False),
        ([], {"aggregation": "mask-mean"}, False),
        ([NEVER, StabilityWeight(tau=0.5), IcePop()], {"aggregation": "mask-mean"}, False),
        ([StabilityWeight(tau=0.5), NEVER], {}, True),
        ([StabilityWeight(tau=0.5)], {"terms": [EntropyBonus(0.1)]}, True),
        ([], {"aggregation": "mask-mean", "imitation": 0.5}, True),
    ],
)
def test_what_is_read_twice(rules: list[Rule], more: dict[str, Any], is_read: bool) -> None:
    """The loss is that of a step of one micro-batch."""
    whole, _ = gradient([ROWS], rules, **more)
    split, read = gradient([4, 2], rules, **more)
    torch.testing.assert_close(split, whole)
    assert read == [(False, 2)] * is_read + [(True, 4), (True, 2)]
