"""Weights by hand; SCOPE's in the paper's direction (U18)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.weights import PositionWeight, ScopeWeight, StabilityWeight
from tests.toy import (
    applied,
    expected_rule_gradient,
    make_scored,
    opd_signal,
    random_logits,
)

STUDENT, TEACHER = random_logits(0), random_logits(1)


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def of_ratio(*rows: list[float], mask: list[list[bool]] | None = None) -> Scored:
    d = tensor(list(rows))
    student = torch.full_like(d, -1.0)
    return make_scored(student, student + d, mask=None if mask is None else torch.tensor(mask))


def weights(rule: Rule, scored: Scored) -> list[list[float]]:
    return applied(rule, scored)[0].weight.tolist()


# StabilityWeight -----------------------------------------------------------------------


def test_stability_by_hand() -> None:
    # Raw weights 1, 1, 1/2, 1/4 with mean 11/16.
    scored = of_ratio([0.0, -2.0, 4.0, -8.0])
    signal, rates = applied(StabilityWeight(tau=2.0), scored)
    expected = tensor([[16 / 11, 16 / 11, 8 / 11, 4 / 11]])
    torch.testing.assert_close(signal.weight, expected)
    assert torch.equal(signal.advantage, scored.log_ratio)
    assert rates["stability_weight/softened"].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("tau", [1e-3, 0.7, 5.0, torch.inf])
def test_u7_stability_has_mean_1_over_the_step(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = StabilityWeight(tau=tau)
    batches = [of_ratio(*(3 * torch.randn(2, 5, generator=generator)).tolist()) for _ in range(3)]
    seen = torch.cat([rule.observe(opd_signal(one), one) for one in batches])
    factors = torch.stack([rule.apply(opd_signal(one), one, seen)[0].weight for one in batches])
    assert factors.mean().item() == pytest.approx(1.0)
    assert (factors == 1).all() == (tau == torch.inf)
    if tau < torch.inf:  # and not within each micro-batch
        assert (factors.mean(dim=(1, 2)) - 1).abs().max() > 1e-3


def test_stability_averages_over_tokens_that_take_part() -> None:
    scored = of_ratio([1.0, 1.0, 8.0])
    signal = opd_signal(scored, torch.tensor([[True, True, False]]))
    assert applied(StabilityWeight(tau=1.0), scored, signal)[0].weight.tolist() == [[1.0] * 3]


# PositionWeight ------------------------------------------------------------------------


def test_position_by_hand() -> None:
    # |d| before each token: 0, 2, 2, 3 of 4; signs do not cancel.
    scored = of_ratio([2.0, 0.0, -1.0, 1.0], [0.0] * 4)
    factors = tensor(weights(PositionWeight(gamma=0.5), scored))
    expected = tensor([[1.5, 1.25, 1.25, 1.125], [1.5] * 4])
    torch.testing.assert_close(factors, expected)


def test_position_counts_only_what_takes_part() -> None:
    scored = of_ratio([9.0, 1.0, 1.0])
    signal = opd_signal(scored, torch.tensor([[False, True, True]]))
    signal, _ = applied(PositionWeight(gamma=1.0), scored, signal)
    assert signal.weight.tolist() == [[1.0, 2.0, 1.5]]


def test_position_without_gamma_is_opd() -> None:
    plain = expected_rule_gradient(None, STUDENT, TEACHER)
    assert torch.equal(expected_rule_gradient(PositionWeight(gamma=0.0), STUDENT, TEACHER), plain)
    weighed = expected_rule_gradient(PositionWeight(), STUDENT, TEACHER)
    assert (weighed - plain).abs().max() > 0.01


# ScopeWeight ---------------------------------------------------------------------------

# Mean log-probs: correct rollouts (rows 0 to 2) under the student, wrong ones under the teacher.
OURS = [[-1.0, -1.0], [-2.0, -4.0], [-0.5, -0.5], [-1.0, -1.0], [-9.0, -9.0]]
THEIRS = [[-1.0, -1.0], [-9.0, -9.0], [-1.0, -1.0], [-0.5, -0.5], [-1.0, -2.0]]
REWARDS = [1.0, 1.0, 1.0, 0.0, 0.0]


def scope_fixture(
    ours: list[list[float]] = OURS,
    theirs: list[list[float]] = THEIRS,
    rewards: list[float] = REWARDS,
    groups: list[int] | None = None,
) -> Scored:
    return make_scored(tensor(ours), tensor(theirs), rewards=rewards, groups=groups)


def factors(rule: ScopeWeight, scored: Scored) -> Tensor:
    weight = applied(rule, scored)[0].weight
    assert torch.equal(weight[:, 0], weight[:, 1])
    return weight[:, 0]


def test_u18_scope_by_hand() -> None:
    scored = scope_fixture()
    unlikely = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).exp()  # PPL_S
    plausible = torch.tensor([-0.5, -1.5], dtype=torch.float64).exp()  # 1 / PPL_T
    expected = torch.cat([3 * unlikely / unlikely.sum(), 2 * plausible / plausible.sum()])
    torch.testing.assert_close(factors(ScopeWeight(), scored), expected)
    signal, rates = applied(ScopeWeight(), scored)
    assert torch.equal(signal.advantage[:3], torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(signal.advantage[3:], scored.log_ratio[3:])
    assert rates["scope/correct"][:, 0].tolist() == REWARDS


def test_u18_the_papers_direction() -> None:
    """Less likely under the student: a correct rollout counts more. Under the teacher: a wrong
    one counts less."""
    before = factors(ScopeWeight(), scope_fixture())
    unlikelier = factors(ScopeWeight(), scope_fixture(ours=[[-1.5, -1.5], *OURS[1:]]))
    assert unlikelier[0] > before[0]
    assert (unlikelier[1:3] < before[1:3]).all()
    assert torch.equal(unlikelier[3:], before[3:])
    implausible = factors(ScopeWeight(), scope_fixture(theirs=[*THEIRS[:4], [-3.0, -3.0]]))
    assert implausible[4] < before[4]
    assert implausible[3] > before[3]
    assert torch.equal(implausible[:3], before[:3])


def test_u18_weights_have_mean_1_in_each_set_of_each_group() -> None:
    groups = [7, 8, 7, 8, 8]
    weight = factors(ScopeWeight(), scope_fixture(groups=groups))
    for rows in ([0, 2], [1], [3, 4]):
        assert weight[rows].mean().item() == pytest.approx(1.0)
    assert weight[1] == 1  # a lone sample
    assert weight[0] != 1


@pytest.mark.parametrize("temperature", [torch.inf, 1e9])
def test_u18_infinite_temperature_is_uniform(temperature: float) -> None:
    weight = factors(ScopeWeight(temperature=temperature), scope_fixture())
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_partial_scores_have_a_threshold() -> None:
    scored = scope_fixture(rewards=[0.5, 0.4, 0.9, 0.0, 0.0])
    for rule, correct in (
        (ScopeWeight(), [1, 0, 1, 0, 0]),
        (ScopeWeight(threshold=0.6), [0, 0, 1, 0, 0]),
    ):
        assert applied(rule, scored)[1]["scope/correct"][:, 0].tolist() == correct


def test_u18_equal_perplexities_are_uniform() -> None:
    ours = [[-1.0, -3.0], [-2.0, -2.0], [-3.0, -1.0], *OURS[3:]]
    weight = factors(ScopeWeight(), scope_fixture(ours=ours))
    torch.testing.assert_close(weight[:3], torch.ones(3, dtype=torch.float64))


def test_u18_an_all_correct_group_does_not_hear_the_teacher() -> None:
    quiet, loud = (
        applied(ScopeWeight(), scope_fixture(theirs=theirs, rewards=[1.0] * 5))[0]
        for theirs in (THEIRS, [[-7.0, -0.1]] * 5)
    )
    assert torch.equal(quiet.advantage, loud.advantage)
    assert torch.equal(quiet.weight, loud.weight)


def test_u18_perplexity_is_per_token_that_takes_part() -> None:
    # Three tokens of -1 against one of -1 and two left out: the same perplexity.
    student = tensor([[-1.0, -1.0, -1.0], [-1.0, -9.0, -9.0]])
    scored = make_scored(student, student, rewards=[1.0, 1.0])
    signal = opd_signal(scored, torch.tensor([[True] * 3, [True, False, False]]))
    signal, _ = applied(ScopeWeight(), scored, signal)
    torch.testing.assert_close(signal.weight, torch.ones_like(student))


def test_rollouts_that_take_no_part_are_no_peers() -> None:
    scored = make_scored(tensor([[-1.0], [-1.0], [-5.0]]), tensor([[-1.0]] * 3), rewards=[1.0] * 3)
    signal = opd_signal(scored, torch.tensor([[True], [True], [False]]))
    signal, _ = applied(ScopeWeight(), scored, signal)
    assert signal.weight.flatten().tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StabilityWeight(tau=0.0), "StabilityWeight: tau is 0.0, expected more than 0"),
        (lambda: PositionWeight(gamma=-0.1), "PositionWeight: gamma is -0.1, expected"),
        (lambda: ScopeWeight(temperature=0.0), "ScopeWeight: temperature is 0.0, expected"),
        (lambda: ScopeWeight(threshold=torch.nan), "ScopeWeight: threshold is nan, expected"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
