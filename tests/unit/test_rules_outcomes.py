"""Weights by rewards, and Distilled RL's advantages, by hand."""

import math

import pytest
import torch

from opd_lightning.methods import GRPO, RLSD, DistilledRL
from opd_lightning.models.student import Student
from opd_lightning.rules import CompetenceWeight, RewardWeight, Signal, TeacherRatio
from opd_lightning.rules.base import Scored
from opd_lightning.teachers import FrozenTeacher
from tests.toy import applied, make_scored, opd_signal

ZERO = torch.zeros(4, 2, dtype=torch.float64)


def test_prompts_at_the_frontier_weigh_most() -> None:
    scored = make_scored(
        torch.zeros(7, 1, dtype=torch.float64), torch.zeros(7, 1, dtype=torch.float64),
        rewards=[1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0], groups=[0, 0, 1, 1, 2, 2, 3],
    )  # fmt: skip
    found = applied(CompetenceWeight(), scored)[0].weight[:, 0].tolist()
    assert found == [0.25, 0.25, 0, 0, 0, 0, 0]  # the last has no peer
    skewed = applied(CompetenceWeight(alpha=0.0, beta=1.0), scored)[0].weight[:, 0].tolist()
    assert skewed == [0.5, 0.5, 0, 0, 1, 1, 0]


def test_rewards_are_weighed_by_a_softmax_over_the_step() -> None:
    scored = make_scored(ZERO, ZERO, rewards=[1.0, 0.0, 0.5, math.nan])
    found = applied(RewardWeight(0.5), scored)[0].weight[:, 0]
    share = torch.softmax(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64) / 0.5, dim=0)
    torch.testing.assert_close(found[:3], 3 * share)
    assert found[3] == 0
    equal = applied(RewardWeight(1e9), scored)[0].weight[:3]
    torch.testing.assert_close(equal, torch.ones_like(equal))


def test_a_rollout_that_takes_no_part_is_not_in_the_mean_of_reward_weights() -> None:
    scored = make_scored(ZERO[:3], ZERO[:3], rewards=[1.0, 0.0, 0.5])
    signal = opd_signal(scored, torch.tensor([[True, True], [False, False], [False, True]]))
    found = applied(RewardWeight(0.5), scored, signal)[0].weight
    share = torch.softmax(torch.tensor([1.0, 0.5], dtype=torch.float64) / 0.5, dim=0)
    torch.testing.assert_close(found[[0, 2], [0, 1]], 2 * share)


@pytest.mark.parametrize("normalise", [True, False])
def test_outcomes_are_divided_by_their_spread_unless_told_not_to(normalise: bool) -> None:
    """GRPO and Dr. GRPO: scores of 1 and 0.5 have the mean 0.75 and the deviation 0.25."""
    scored = make_scored(ZERO[:2], ZERO[:2], rewards=[1.0, 0.5])
    student, teacher = Student("nowhere"), FrozenTeacher("nowhere")
    for method in (
        GRPO(student, normalise_std=normalise),
        DistilledRL(student, teacher, normalise_std=normalise),
    ):
        size = 1.0 if normalise else 0.25
        expected = torch.tensor([[size], [-size]], dtype=torch.float64).expand(2, 2)
        torch.testing.assert_close(method.advantage(scored), expected, atol=1e-5, rtol=0)
    for default in (GRPO(student), DistilledRL(student, teacher), RLSD(student, teacher)):
        assert default.advantage(scored)[0, 0].item() == pytest.approx(1.0, abs=1e-5)


def spread(scored: Scored) -> torch.Tensor:
    method = DistilledRL(Student("nowhere"), FrozenTeacher("nowhere"), normalise_std=False)
    (rule,) = method.rules
    assert method.needs_groups
    assert method.sums_tokens or rule.sums_tokens
    plain = opd_signal(scored)
    signal = Signal(advantage=method.advantage(scored), weight=plain.weight, mask=plain.mask)
    return applied(rule, scored, signal)[0].advantage


def test_distilled_rl_spreads_what_is_positive() -> None:
    d = torch.tensor([[0.5, -0.5, 9.0], [2.0, -9.0, 0.3]], dtype=torch.float64)
    student = torch.full_like(d, -1.0)
    scored = make_scored(student, student + d, rewards=[1.0, 0.0])
    ratios = torch.tensor([math.exp(0.5), math.exp(-0.5), 3.0], dtype=torch.float64)
    expected = 0.5 * ratios / ratios.prod() ** (1 / 3)
    found = spread(scored)
    torch.testing.assert_close(found[0], expected)
    assert found[0].log().mean().item() == pytest.approx(math.log(0.5))  # geometric mean as before
    assert found[1].tolist() == [-0.5] * 3
    same = spread(make_scored(student, student, rewards=[1.0, 0.0]))  # GRPO
    assert torch.equal(same, torch.tensor([[0.5], [-0.5]], dtype=torch.float64).expand(2, 3))


def test_tokens_left_out_do_not_enter_the_mean() -> None:
    d = torch.tensor([[0.5, 1.0, -2.0]], dtype=torch.float64)
    scored = make_scored(torch.zeros_like(d), d)
    mask = torch.tensor([[True, True, False]])
    signal = Signal(advantage=torch.ones_like(d), weight=torch.ones_like(d), mask=mask)
    found = applied(TeacherRatio(), scored, signal)[0].advantage
    torch.testing.assert_close(
        found, torch.tensor([[math.exp(-0.25), math.exp(0.25), 1.0]]).double()
    )
