"""Losses against enumeration and finite differences on toy policies, float64."""

import pytest
import torch
from torch import Tensor

from opd_lightning.losses.advantage import extrapolated, return_to_go
from opd_lightning.losses.divergence import kl
from opd_lightning.losses.reduction import Aggregation, aggregate
from opd_lightning.types import Totals
from tests.toy import (
    ALL,
    SEQUENCES,
    expected_gradient,
    finite_difference,
    local_reverse_kl,
    policy_gradient,
    random_logits,
    sequence_probs,
    token_logprobs,
    visit_probabilities,
)


def log_ratio(theirs: Tensor, ours: Tensor) -> Tensor:
    return extrapolated(theirs, ours, None, 1.0)


@pytest.fixture
def student() -> Tensor:
    return random_logits(0)


@pytest.fixture
def teacher() -> Tensor:
    return random_logits(1)


def test_u1_sampled_loss_has_the_gradient_of_the_local_reverse_kl(
    student: Tensor, teacher: Tensor
) -> None:
    theirs = token_logprobs(teacher)
    sampled = expected_gradient(
        student, lambda ours: policy_gradient(ours, log_ratio(theirs, ours))
    )
    visits = visit_probabilities(student)
    exact = finite_difference(lambda at: local_reverse_kl(at, teacher, visits), student)
    torch.testing.assert_close(sampled, exact, atol=1e-6, rtol=0)
    assert exact.abs().max() > 0.01


def test_full_vocabulary_loss_has_the_same_gradient(student: Tensor, teacher: Tensor) -> None:
    visits = visit_probabilities(student)
    at = student.clone().requires_grad_()
    (direct,) = torch.autograd.grad(local_reverse_kl(at, teacher, visits), at)
    exact = finite_difference(lambda x: local_reverse_kl(x, teacher, visits), student)
    torch.testing.assert_close(direct, exact, atol=1e-6, rtol=0)


def test_u1_holds_for_draws(student: Tensor, teacher: Tensor) -> None:
    """A Monte-Carlo estimate is within four standard errors, in every coordinate."""
    draws = 200_000
    generator = torch.Generator().manual_seed(2)
    chosen = torch.multinomial(sequence_probs(student), draws, True, generator=generator)
    counts = torch.bincount(chosen, minlength=len(SEQUENCES)).double()
    # The gradient of each sequence's loss by itself: [S, prefixes, V].
    theirs = token_logprobs(teacher)

    def sequence_losses(at: Tensor) -> Tensor:
        ours = token_logprobs(at)
        return policy_gradient(ours, log_ratio(theirs, ours)).sum(dim=1)

    score = torch.autograd.functional.jacobian(sequence_losses, student)
    estimate = (counts[:, None, None] * score).sum(0) / draws
    probs = sequence_probs(student)[:, None, None]
    error = ((probs * score**2).sum(0) - (probs * score).sum(0) ** 2).clamp(min=0)
    visits = visit_probabilities(student)
    exact = finite_difference(lambda at: local_reverse_kl(at, teacher, visits), student)
    assert ((estimate - exact).abs() <= 4 * (error / draws).sqrt() + 1e-8).all()


def test_u2_differentiating_the_log_ratio_itself_teaches_nothing(
    student: Tensor, teacher: Tensor
) -> None:
    theirs = token_logprobs(teacher)
    gradient = expected_gradient(student, lambda ours: ours - theirs)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_u3_identical_models_give_no_loss_and_no_gradient(student: Tensor) -> None:
    ours = token_logprobs(student).requires_grad_()
    losses = policy_gradient(ours, log_ratio(ours, ours))
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    assert losses.abs().max() == 0
    assert gradient.abs().max() == 0
    at = student.clone().requires_grad_()
    divergence = kl(at.log_softmax(-1), student.log_softmax(-1))
    (gradient,) = torch.autograd.grad(divergence.sum(), at)
    assert divergence.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_return_to_go_1_has_the_gradient_of_the_sequence_kl(
    student: Tensor, teacher: Tensor
) -> None:
    theirs = token_logprobs(teacher)

    def losses(ours: Tensor) -> Tensor:
        return policy_gradient(ours, return_to_go(log_ratio(theirs, ours), ALL, 1.0))

    def sequence_kl(at: Tensor) -> Tensor:
        ours = token_logprobs(at)
        return (ours.sum(1).exp() * (ours - theirs).sum(1)).sum()

    exact = finite_difference(sequence_kl, student)
    torch.testing.assert_close(expected_gradient(student, losses), exact, atol=1e-6, rtol=0)
    immediate = expected_gradient(student, lambda x: policy_gradient(x, log_ratio(theirs, x)))
    assert (immediate - exact).abs().max() > 1e-3  # the two objectives do differ


def test_return_to_go_by_hand() -> None:
    signal = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, float("nan")]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert return_to_go(signal, mask, 0.0).tolist() == [[1, 2, 4], [1, 2, 0]]
    assert return_to_go(signal, mask, 0.5).tolist() == [[3, 4, 4], [2, 2, 0]]
    gap = torch.tensor([[True, False, True]])  # as where a tool's answer stands
    assert return_to_go(torch.tensor([[1.0, 9.0, 4.0]]), gap, 0.5).tolist() == [[2, 0, 4]]


def test_sign_a_token_the_teacher_prefers_becomes_likelier() -> None:
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    ours = logits.log_softmax(-1)[:, :1]
    theirs = torch.tensor([[0.9]], dtype=torch.float64).log()
    policy_gradient(ours, log_ratio(theirs, ours)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", 10 / 4), ("seq-mean-token-mean", (2 + 4) / 2), ("seq-mean-token-sum", 5.0)],
)
def test_aggregation_by_hand(mode: str, expected: float) -> None:
    assert aggregate(LOSSES, MASK, Totals(4, 2), mode).item() == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_u5_shares_of_micro_batches_add_up(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 9, generator=generator) > 0.4
    sizes = Totals(int(mask.sum()), 7)
    whole = aggregate(losses, mask, sizes, mode)  # type: ignore[arg-type]
    shares = [
        aggregate(losses[rows], mask[rows], sizes, mode)  # type: ignore[arg-type]
        for rows in ([0], [1, 2, 3], [4, 5], [6])
    ]
    torch.testing.assert_close(torch.stack(shares).sum(), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "mask-mean"]
)
def test_a_fully_masked_step_has_loss_zero_and_a_graph(mode: Aggregation) -> None:
    losses = torch.ones(2, 3, requires_grad=True)
    loss = aggregate(losses, torch.zeros(2, 3, dtype=torch.bool), Totals(0, 0), mode)
    loss.backward()
    assert loss.item() == 0
    assert losses.grad is not None
    assert losses.grad.abs().max() == 0
