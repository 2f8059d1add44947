"""PPO's surrogate against hand-made numbers and exact expectations, float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.surrogate import Surrogate

ON = torch.tensor([True])


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def loss_and_gradient(
    surrogate: Surrogate, student: Tensor, advantage: Tensor, sampler: Tensor, rows: Tensor = ON
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = surrogate(student, advantage, sampler, rows)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


@pytest.mark.parametrize(
    "surrogate",
    [Surrogate(), Surrogate(clip_low=0.2, clip_high=0.2, dual_clip=3.0), Surrogate(clip_low=0.0)],
    ids=repr,
)
def test_one_step_per_batch_is_the_plain_policy_gradient(surrogate: Surrogate) -> None:
    """Ratios to the trainer are 1: no clip acts, in value or gradient, and mu is not read."""
    student, advantage = row(-0.5, -2.0, -3.0), row(1.5, -0.7, 0.0)
    mu = row(-9.0, torch.nan, 0.0)
    loss, gradient = loss_and_gradient(surrogate, student, advantage, mu)
    leaf = student.clone().requires_grad_()
    plain = -advantage * (leaf - leaf.detach()).exp()
    plain.sum().backward()
    assert torch.equal(loss, plain.detach())
    assert leaf.grad is not None
    assert torch.equal(gradient, leaf.grad)
    assert gradient.tolist() == [[-1.5, 0.7, 0.0]]


def test_the_full_ratio_takes_the_samplers_bias_away() -> None:
    """E_mu[gradient of -A pi / mu] is E_pi[-A grad log pi]; without the ratio it is not."""
    generator = torch.Generator().manual_seed(0)
    logits, sampler, advantage = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mu = sampler.log_softmax(0)

    def gradient(surrogate: Surrogate, weights: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss = surrogate(leaf.log_softmax(0)[None], advantage[None], mu[None], ON)
        (gradient,) = torch.autograd.grad((weights * loss).sum(), leaf)
        return gradient

    wanted = gradient(Surrogate(), logits.softmax(0))
    corrected = gradient(Surrogate(ratio_to="sampler"), mu.exp())
    torch.testing.assert_close(corrected, wanted, atol=1e-12, rtol=0)
    assert (gradient(Surrogate(), mu.exp()) - wanted).abs().max() > 1e-2


PPO = Surrogate(ratio_to="sampler", clip_low=0.2, clip_high=0.3, dual_clip=3.0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "moves"),
    [
        (2.0, 1.1, -2.2, True),
        (2.0, 1.5, -2.6, False),  # clipped at 1.3
        (2.0, 0.5, -1.0, True),  # a good token that became rare may always come back
        (-2.0, 0.9, 1.8, True),
        (-2.0, 0.5, 1.6, False),  # clipped at 0.8
        (-2.0, 2.0, 4.0, True),  # a bad token that became common may always go
        (-2.0, 5.0, 6.0, False),  # dual clip: no more than 3 |A|
        (2.0, 5.0, -2.6, False),  # which leaves good tokens alone
    ],
)
def test_clips_by_hand(advantage: float, ratio: float, loss: float, moves: bool) -> None:
    student = row(-1.0)
    sampler = student - row(ratio).log()
    value, gradient = loss_and_gradient(PPO, student, row(advantage), sampler)
    assert value.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(-advantage * ratio if moves else 0.0)


def test_one_side_may_be_clipped_alone() -> None:
    student, advantage = row(-1.0, -1.0), row(1.0, -1.0)
    sampler = student - row(9.0, 0.1).log()
    low = Surrogate(ratio_to="sampler", clip_low=0.2)(student, advantage, sampler, ON)
    high = Surrogate(ratio_to="sampler", clip_high=0.2)(student, advantage, sampler, ON)
    torch.testing.assert_close(low, row(-9.0, 0.8))
    torch.testing.assert_close(high, row(-1.2, 0.1))


def test_rows_of_others_keep_the_trainers_ratio() -> None:
    """Guided rows were sampled under another prompt, recorded ones have no sampler (NaN)."""
    student = torch.tensor([[-1.0, -2.0]] * 3, dtype=torch.float64)
    sampler = torch.tensor([[-2.0, -3.0], [-9.0, -9.0], [torch.nan] * 2], dtype=torch.float64)
    rows = torch.tensor([True, False, False])
    loss, gradient = loss_and_gradient(
        Surrogate(ratio_to="sampler"), student, torch.ones_like(student), sampler, rows
    )
    e = torch.e
    torch.testing.assert_close(loss, -torch.tensor([[e, e], [1, 1], [1, 1]], dtype=torch.float64))
    torch.testing.assert_close(gradient, loss)


def test_nothing_flows_through_advantages() -> None:
    advantage = row(1.0).requires_grad_()
    student = row(-1.0).requires_grad_()
    PPO(student, advantage, row(-1.0), ON).sum().backward()
    assert advantage.grad is None


@pytest.mark.parametrize(
    "fields", [{"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"clip_low": torch.nan}]
)
def test_mistakes_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"Surrogate: {next(iter(fields))} is .*, expected"):
        Surrogate(**fields)
