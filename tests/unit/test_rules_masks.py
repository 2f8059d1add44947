"""Masks by place, by id and by importance."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Staircase
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.masks import PrefixWindow, SkipFirst, TokenImportanceMask, TokenMask
from tests.toy import TOKENS, applied, expected_rule_gradient, make_scored, random_logits

STUDENT, TEACHER = random_logits(0), random_logits(1)
# The second response has a gap, as where a tool's answer stands.
MASK = torch.tensor([[True, True, True, True, False], [True, False, True, True, True]])
IDS = torch.tensor([[5, 6, 7, 2, 0], [5, 7, 7, 6, 2]])


def fixture(step: int = 0) -> Scored:
    zeros = torch.zeros(MASK.shape, dtype=torch.float64)
    return make_scored(zeros, zeros, mask=MASK, ids=IDS, step=step)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (PrefixWindow(2), [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]),
        (PrefixWindow(2.9), [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]),
        (SkipFirst(1), [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]),
        (SkipFirst(), [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]),
        (SkipFirst(9), [[0] * 5, [0] * 5]),
        (TokenMask((7, 2)), [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]),
    ],
    ids=repr,
)
def test_masks_by_hand(rule: Rule, expected: list[list[int]]) -> None:
    signal, rates = applied(rule, fixture())
    assert signal.mask.int().tolist() == expected
    (kept,) = rates.values()
    assert kept.tolist() == expected


@pytest.mark.parametrize("rule", [PrefixWindow(2), SkipFirst(0), TokenMask((9,))], ids=repr)
def test_masks_that_leave_nothing_out_are_opd(rule: Rule) -> None:
    plain = expected_rule_gradient(None, STUDENT, TEACHER)
    assert torch.equal(expected_rule_gradient(rule, STUDENT, TEACHER, ids=TOKENS), plain)


@pytest.mark.parametrize("rule", [PrefixWindow(1), SkipFirst(1), TokenMask((3,))], ids=repr)
def test_and_those_that_do_are_not(rule: Rule) -> None:
    plain = expected_rule_gradient(None, STUDENT, TEACHER)
    masked = expected_rule_gradient(rule, STUDENT, TEACHER, ids=TOKENS)
    assert (masked - plain).abs().max() > 0.01


def test_the_window_grows() -> None:
    rule = PrefixWindow(Staircase(maximum=3, start=1, increment=1, every=2))
    lengths = [int(applied(rule, fixture(step))[0].mask[0].sum()) for step in range(7)]
    assert lengths == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixWindow(0), "PrefixWindow: tokens is 0, expected 1 or more"),
        (lambda: SkipFirst(-1), "SkipFirst: tokens is -1, expected 0 or more"),
        (lambda: TokenMask(()), r"TokenMask: token_ids is \(\), expected at least one token id"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_tip_scores_unsure_tokens_and_sure_mistakes() -> None:
    """1 for a uniform student or a disjoint teacher, 0 where both are sure and agree."""
    uniform, first, second = ([0.0, 0.0], [300.0, 0.0], [0.0, 300.0])
    student = torch.tensor([uniform, first, first], dtype=torch.float64).log_softmax(-1)
    teacher = torch.tensor([uniform, second, first], dtype=torch.float64).log_softmax(-1)
    ((name, compare),) = TokenImportanceMask().comparisons().items()
    assert compare.other == "teacher"
    score = compare.function(student, teacher)
    torch.testing.assert_close(score, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    # A soft or: h + delta - h delta of both.
    ours, theirs = (torch.tensor([x], dtype=torch.float64) for x in ([0.8, 0.2], [0.3, 0.7]))
    mixed = (ours + theirs) / 2
    unsure = -(ours * ours.log()).sum() / math.log(2)
    apart = ((ours * (ours / mixed).log() + theirs * (theirs / mixed).log()).sum()) / 2
    expected = 1 - (1 - unsure) * (1 - apart / math.log(2))
    torch.testing.assert_close(compare.function(ours.log(), theirs.log())[0], expected)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    scored = make_scored(zeros, zeros, values={name: score[None]})
    assert applied(TokenImportanceMask(0.5), scored)[0].mask.tolist() == [[True, True, False]]
