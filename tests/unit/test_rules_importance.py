"""Importance weights (U14): by hand, and exact expectations over a sampler that is off."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.truncation import KeptMass
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.importance import DriftGate, IcePop, TruncatedImportance
from tests.toy import (
    applied,
    expected_rule_gradient,
    make_scored,
    opd_signal,
    random_logits,
    sequence_probs,
    surrogate_loss,
    token_logprobs,
)

STUDENT, TEACHER, SAMPLER = (random_logits(seed) for seed in range(3))
RULES: list[Rule] = [
    TruncatedImportance(),
    TruncatedImportance(level="sequence"),
    TruncatedImportance(unit_mean=True),
    IcePop(),
]


def of_ratios(
    *ratios: list[float],
    mask: list[list[bool]] | None = None,
    on_policy: list[bool] | None = None,
) -> Scored:
    """Rollouts whose pi / mu is this, token by token."""
    wanted = torch.tensor(ratios, dtype=torch.float64)
    student = torch.full_like(wanted, -1.0)
    return make_scored(
        student,
        student,
        behaviour=student - wanted.log(),
        mask=None if mask is None else torch.tensor(mask),
        on_policy=on_policy,
    )


def weights(rule: Rule, scored: Scored) -> Tensor:
    return applied(rule, scored)[0].weight


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_u14_engines_that_agree_weigh_1(rule: Rule) -> None:
    assert weights(rule, of_ratios([1.0, 1.0, 1.0])).tolist() == [[1.0, 1.0, 1.0]]


def test_u14_token_level_by_hand() -> None:
    signal, rates = applied(TruncatedImportance(), of_ratios([10.0, 5.0, 0.01]))
    close(signal.weight, [[5.0, 5.0, 0.01]])
    assert rates["importance/truncated"][0, [0, 2]].tolist() == [1, 0]
    close(rates["importance/weight"], [[5.0, 5.0, 0.01]])
    close(weights(TruncatedImportance(cap=2.0), of_ratios([10.0, 0.5])), [[2.0, 0.5]])
    _, rates = applied(TruncatedImportance(cap=1.0), of_ratios([1.0]))
    assert rates["importance/truncated"].item() == 0


def test_u14_sequence_level_is_the_product() -> None:
    scored = of_ratios([2.0, 2.0], [4.0, 3.0], [0.5, 0.5])
    close(weights(TruncatedImportance("sequence"), scored), [[4.0, 4.0], [5.0, 5.0], [0.25, 0.25]])


def test_u14_padding_does_not_enter_a_sequences_product() -> None:
    scored = of_ratios([2.0, 100.0], mask=[[True, False]])
    close(weights(TruncatedImportance("sequence"), scored), [[2.0, 1.0]])


def test_u14_a_sequences_product_is_over_all_it_wrote() -> None:
    """The probability of a response does not depend on its mask."""
    scored = of_ratios([2.0, 2.0])
    signal = opd_signal(scored, torch.tensor([[True, False]]))
    close(applied(TruncatedImportance("sequence"), scored, signal)[0].weight, [[4.0, 1.0]])


def test_ice_pop_by_hand() -> None:
    signal, rates = applied(IcePop(), of_ratios([0.4, 0.6, 1.0, 4.9, 5.1]))
    close(signal.weight, [[0.0, 0.6, 1.0, 4.9, 0.0]])
    assert signal.mask.all()  # they still count in the normaliser
    assert rates["ice_pop/dropped"].tolist() == [[1, 0, 0, 0, 1]]
    assert weights(IcePop(low=1.0, high=1.0), of_ratios([1.0])).item() == 1  # both included


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_of_others_weigh_1_and_their_nan_stays_where_it_is(rule: Rule) -> None:
    """A guided row has another prompt's log-probs, a recorded one none."""
    scored = of_ratios(
        [1.0, 1.0], [9.0, 0.1], [torch.nan, torch.nan], on_policy=[True] + [False] * 2
    )
    signal, rates = applied(rule, scored)
    assert signal.weight.tolist() == [[1.0, 1.0]] * 3
    assert all(value.isfinite().all() for value in rates.values())


def test_a_cap_below_1_does_not_reach_the_rows_of_others() -> None:
    scored = of_ratios([1.0], [1.0], on_policy=[True, False])
    assert weights(TruncatedImportance(cap=0.5), scored).tolist() == [[0.5], [1.0]]


def test_enormous_ratios_are_finite() -> None:
    scored = make_scored(
        torch.zeros(1, 1), torch.zeros(1, 1), behaviour=torch.full((1, 1), -1000.0)
    )
    assert weights(TruncatedImportance(cap=1e30), scored).item() == pytest.approx(4.85e8, rel=1e-2)
    assert weights(IcePop(), scored).item() == 0
    rare = make_scored(torch.full((1, 1), -1000.0), torch.zeros(1, 1), behaviour=torch.zeros(1, 1))
    assert weights(TruncatedImportance(), rare).item() == pytest.approx(math.exp(-20))


def test_u14_no_gradient_through_the_weight() -> None:
    scored = of_ratios([3.0])
    student = scored.student.logprobs.clone().requires_grad_()
    signal = opd_signal(scored)
    signal.advantage.fill_(1.0)
    signal, _ = applied(TruncatedImportance(), scored, signal)
    surrogate_loss(student, signal).sum().backward()
    assert not signal.weight.requires_grad
    assert student.grad is not None
    # w A grad log pi, and not its derivative by w besides.
    assert student.grad.item() == pytest.approx(-3.0)


def gradient_under_sampler(rule: Rule | None) -> Tensor:
    """The gradient of the tree's first tokens, sampled by the engine."""
    behaviour = token_logprobs(SAMPLER)
    first = torch.tensor([True, False]).expand_as(behaviour)
    student = STUDENT.clone().requires_grad_()
    ours = token_logprobs(student)
    scored = make_scored(ours, token_logprobs(TEACHER), behaviour=behaviour)
    signal = opd_signal(scored, first)
    if rule is not None:
        signal, _ = applied(rule, scored, signal)
    loss = (sequence_probs(SAMPLER)[:, None] * surrogate_loss(ours, signal)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def test_untruncated_weights_take_the_samplers_bias_away() -> None:
    wanted = torch.zeros_like(STUDENT)
    wanted[0] = expected_rule_gradient(None, STUDENT, TEACHER)[0]  # of the empty prefix
    corrected = gradient_under_sampler(TruncatedImportance(cap=1e9))
    torch.testing.assert_close(corrected[0], wanted[0], atol=1e-12, rtol=0)
    assert (gradient_under_sampler(None) - wanted).abs().max() > 0.01


def test_unit_mean_at_token_level_is_over_the_step() -> None:
    rule = TruncatedImportance(unit_mean=True)
    batches = [of_ratios([1.0, 2.0]), of_ratios([4.0, 9.0], [3.0, 3.0], on_policy=[True, False])]
    seen = torch.cat([rule.observe(opd_signal(one), one) for one in batches])
    found = [rule.apply(opd_signal(one), one, seen)[0].weight for one in batches]
    close(found[0], [[1 / 3, 2 / 3]])  # mean of 1, 2, 4, 5
    close(found[1], [[4 / 3, 5 / 3], [1.0, 1.0]])


def test_unit_mean_at_sequence_level_is_over_rollouts() -> None:
    scored = of_ratios([2.0, 1.0], [4.0, 9.0], mask=[[True, True], [True, False]])
    rule = TruncatedImportance(level="sequence", unit_mean=True)
    close(weights(rule, scored), [[2 / 3, 2 / 3], [4 / 3, 1.0]])


def test_unit_mean_is_over_what_takes_part() -> None:
    scored = of_ratios([1.0, 3.0, 4.0])
    signal = opd_signal(scored, torch.tensor([[True, True, False]]))
    close(applied(TruncatedImportance(unit_mean=True), scored, signal)[0].weight, [[0.5, 1.5, 1.0]])


def test_only_the_mean_looks_at_the_step() -> None:
    assert [TruncatedImportance(unit_mean=on).step_wide for on in (False, True)] == [False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedImportance(cap=0.0), "TruncatedImportance: cap is 0.0, expected"),
        (lambda: IcePop(low=0.0), r"IcePop: low is 0.0, expected a number in \(0, 1\]"),
        (lambda: IcePop(high=0.9), "IcePop: high is 0.9, expected 1 or more"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# DriftGate -----------------------------------------------------------------------------------


def test_a_drift_gate_weighs_blocks_by_their_mean_drift() -> None:
    """Drifts cancel within a block; a token that is left out belongs to none."""
    e = math.e
    scored = of_ratios([e, 1 / e, e, e, 1.0], mask=[[True, True, True, False, True]])
    # The second block has the drifts 1 and 0, mean 1/2, at strength 2.
    raw = torch.tensor([1.0, 1.0, math.exp(-1), math.exp(-1)], dtype=torch.float64)
    found = weights(DriftGate(2.0, block=2), scored)[0, [0, 1, 2, 4]]
    torch.testing.assert_close(found, raw / raw.mean())
    assert found.mean().item() == pytest.approx(1.0)
    (short,) = weights(DriftGate(1.0, block=2), of_ratios([1.0, 1.0, e]))  # a block of one token
    assert (short[2] / short[0]).item() == pytest.approx(math.exp(-1))


def test_a_drift_gate_without_drift_does_nothing() -> None:
    assert weights(DriftGate(5.0), of_ratios([1.0, 1.0])).tolist() == [[1.0, 1.0]]
    assert weights(DriftGate(0.0), of_ratios([2.0, 0.1])).tolist() == [[1.0, 1.0]]
    other = of_ratios([3.0, 3.0], [1.0, 1.0], on_policy=[False, True])  # of another sampler
    assert weights(DriftGate(5.0), other).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_drift_gate_compares_policies_that_are_truncated_alike() -> None:
    """Engine and trainer are one model; top-p cuts much of an unsure block, none of a sure one."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]]).double()
    whole = logits.log_softmax(-1)
    mass = KeptMass(0.9, 0)(whole)
    student = whole[:, 0][None]  # [1, 2], one token a block
    scored = make_scored(student, student, behaviour=student - mass)
    scored = replace(scored, student=replace(scored.student, log_mass=mass[None]))
    assert mass[0] < -0.05 < mass[1]
    close(weights(DriftGate(1.0, block=1), scored), [[1.0, 1.0]])
    # Importance weights are relative to the truncated sampler.
    close(weights(TruncatedImportance(), scored), mass.exp()[None].tolist())
