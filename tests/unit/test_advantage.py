"""G-OPD's extrapolated advantage by enumeration (U6), and the group advantage by hand."""

import pytest
import torch
from torch import Tensor

from opd_lightning.losses.advantage import extrapolated, group_advantage
from tests.toy import (
    expected_gradient,
    finite_difference,
    local_reverse_kl,
    policy_gradient,
    random_logits,
    token_logprobs,
    visit_probabilities,
)

STUDENT, TEACHER, REFERENCE, OTHER = (random_logits(seed) for seed in range(4))
OURS, THEIRS, REFS = (token_logprobs(logits) for logits in (STUDENT, TEACHER, REFERENCE))


def scaled_gradient(at: Tensor, teacher: Tensor, reference: Tensor, scale: float) -> Tensor:
    theirs, refs = token_logprobs(teacher), token_logprobs(reference)
    return expected_gradient(
        at, lambda ours: policy_gradient(ours, extrapolated(theirs, ours, refs, scale))
    )


def target(scale: float) -> Tensor:
    """Logits of pi_T^scale pi_ref^(1 - scale)."""
    return scale * TEACHER.log_softmax(-1) + (1 - scale) * REFERENCE.log_softmax(-1)


def test_u6_scale_1_is_opd_to_the_bit_and_reads_no_reference() -> None:
    plain = THEIRS - OURS
    for reference in (REFS, token_logprobs(OTHER), torch.full_like(REFS, torch.nan), None):
        assert torch.equal(extrapolated(THEIRS, OURS, reference, 1.0), plain)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7])
def test_u6_gradient_is_that_of_the_kl_to_the_geometric_mixture(scale: float) -> None:
    visits = visit_probabilities(STUDENT)
    exact = finite_difference(lambda at: local_reverse_kl(at, target(scale), visits), STUDENT)
    sampled = scaled_gradient(STUDENT, TEACHER, REFERENCE, scale)
    torch.testing.assert_close(sampled, exact, atol=1e-6, rtol=0)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7])
def test_u6_the_mixture_is_the_optimum_and_the_teacher_is_not(scale: float) -> None:
    there = scaled_gradient(target(scale), TEACHER, REFERENCE, scale)
    assert there.abs().max() < 1e-12
    assert scaled_gradient(TEACHER, TEACHER, REFERENCE, scale).abs().max() > 0.01


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7])
def test_u6_a_teacher_that_is_the_reference_gives_opd(scale: float) -> None:
    assert torch.equal(extrapolated(THEIRS, OURS, THEIRS, scale), THEIRS - OURS)


def test_u6_scale_0_does_not_depend_on_the_teacher() -> None:
    one = extrapolated(THEIRS, OURS, REFS, 0.0)
    other = extrapolated(token_logprobs(OTHER), OURS, REFS, 0.0)
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    torch.testing.assert_close(one, REFS - OURS, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25, 1.8])
def test_u6_it_is_minus_the_scaled_reverse_kl(scale: float) -> None:
    """The form of the official code; at 1 this compares the short cut with the general branch."""
    reverse_kl = (OURS - REFS) - scale * (THEIRS - REFS)
    actual = extrapolated(THEIRS, OURS, REFS, scale)
    torch.testing.assert_close(actual, -reverse_kl, atol=1e-12, rtol=0)


def test_nothing_flows_through_an_advantage() -> None:
    theirs, ours, refs = (x.clone().requires_grad_() for x in (THEIRS, OURS, REFS))
    assert not extrapolated(theirs, ours, refs, 1.5).requires_grad


def test_group_advantage_by_hand() -> None:
    # The last two: a group of one, and a rollout without a score in a group that has a spread.
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.3, torch.nan])
    mean = torch.tensor([0.5, 0.5, 1.0, 0.75, torch.nan, 0.5])
    std = torch.tensor([0.5, 0.5, 0.0, 0.4, torch.nan, 0.5])
    plain = group_advantage(rewards, mean, std, normalise=False)
    assert plain.tolist() == [[0.5], [-0.5], [0.0], [0.25], [0.0], [0.0]]
    whitened = group_advantage(rewards, mean, std, epsilon=0.1)
    expected = torch.tensor([[0.5 / 0.6], [-0.5 / 0.6], [0], [0.5], [0], [0]])
    torch.testing.assert_close(whitened, expected)
    small = torch.tensor([1e-6], dtype=torch.float64)  # verl's epsilon
    assert group_advantage(small, 0 * small, small).item() == pytest.approx(0.5)


def test_a_group_of_equals_gives_exactly_nothing_whatever_rounding_says() -> None:
    reward, mean = torch.tensor([0.1]), torch.tensor([0.1 + 1e-8])
    assert reward.ne(mean), "the fixture has a rounding error"
    for std in (0.0, 1e-8):
        assert group_advantage(reward, mean, torch.tensor([std])).item() == 0
