"""KL estimators: exact expectations over a vocabulary, float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_lightning.losses.divergence import Divergence, ForwardKL, ReverseKL
from opd_lightning.losses.estimators import k2, k3

VOCABULARY = 6
GENERATOR = torch.Generator().manual_seed(3)
STUDENT = torch.randn(VOCABULARY, generator=GENERATOR, dtype=torch.float64)
TEACHER = torch.randn(VOCABULARY, generator=GENERATOR, dtype=torch.float64)
S, T = STUDENT.softmax(-1), TEACHER.softmax(-1)
Estimator = Callable[[Tensor, Tensor], Tensor]


def expected_value(estimate: Estimator) -> Tensor:
    return (S * estimate(S.log(), T.log())).sum()


def expected_gradient(estimate: Estimator) -> Tensor:
    """E over sampled tokens of the gradient of their estimate, in the student's logits."""
    logits = STUDENT.clone().requires_grad_()
    total = (S * estimate(logits.log_softmax(-1), T.log())).sum()
    return torch.autograd.grad(total, logits)[0]


def finite_difference(divergence: Divergence, h: float = 1e-6) -> Tensor:
    def value(logits: Tensor) -> Tensor:
        return divergence(logits.log_softmax(-1), T.log())

    steps = h * torch.eye(VOCABULARY, dtype=torch.float64)
    return torch.stack([(value(STUDENT + s) - value(STUDENT - s)) / (2 * h) for s in steps])


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_u2_gradients() -> None:
    reverse, forward = finite_difference(ReverseKL()), finite_difference(ForwardKL())
    assert (reverse - forward).abs().max() > 0.01  # the next lines distinguish them
    close(expected_gradient(k2), reverse, atol=1e-6)
    close(expected_gradient(k3), forward, atol=1e-6)


def test_expected_values() -> None:
    kl = ReverseKL()(S.log(), T.log())
    close(expected_value(k3), kl, atol=1e-12)
    assert (expected_value(k2) - kl).abs() > 0.01
    # Equal to second order: the difference falls with the cube of the distance.
    ratios = []
    for distance in (1e-2, 1e-3):
        near = (STUDENT + distance * TEACHER).log_softmax(-1)
        estimate = (S * k2(S.log(), near)).sum()
        ratios.append(((estimate / ReverseKL()(S.log(), near)) - 1).abs().item())
    assert ratios[1] < 0.2 * ratios[0] < 0.01


def test_by_hand() -> None:
    ours = torch.tensor([[0.2, 0.5]], dtype=torch.float64).log()
    theirs = torch.tensor([[0.4, 0.25]], dtype=torch.float64).log()
    log_2 = torch.tensor(2.0, dtype=torch.float64).log().item()
    half = log_2**2 / 2
    assert k2(ours, theirs).tolist() == [pytest.approx([half, half])]
    assert k3(ours, theirs).tolist() == [pytest.approx([2 - 1 - log_2, 0.5 - 1 + log_2])]


@pytest.mark.parametrize("estimate", [k2, k3])
def test_u3_zero_at_equality(estimate: Estimator) -> None:
    ours = S.log().requires_grad_()
    value = estimate(ours, S.log())
    (gradient,) = torch.autograd.grad(value.sum(), ours)
    assert value.abs().max() == 0
    assert gradient.abs().max() == 0


def test_k3_is_never_negative_in_float32() -> None:
    d = torch.linspace(-1e-3, 1e-3, 2001)
    assert (k3(torch.zeros_like(d), d) >= 0).all()
