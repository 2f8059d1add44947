"""Full-vocabulary divergences against hand-made numbers, finite differences and TRL, float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import (
    JSD,
    AdaptiveKL,
    AlphaBetaDivergence,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TokenwiseKL,
    TotalVariation,
)
from opd_lightning.losses.schedule import Linear
from opd_lightning.losses.target import GeometricTarget
from tests.toy import finite_difference

VOCABULARY = 7
ALL: list[Divergence] = [
    ReverseKL(),
    ForwardKL(),
    *(JSD(beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(SkewedForwardKL(alpha) for alpha in (0.0, 0.1, 0.7)),
    *(SkewedReverseKL(alpha) for alpha in (0.0, 0.1, 0.7)),
    TotalVariation(),
    *(AdaptiveKL(head) for head in (0.0, 0.5, 1.0)),
    JSD(0.5, clip=0.02),
    MixedKL(0.3),
    TokenwiseKL(),
    *(AlphaBetaDivergence(a, b) for a, b in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.6), (1.2, 0.5))),
    GeometricTarget(0.5),
    GeometricTarget(0.4, direction="reverse"),
]
DETACHED = (AdaptiveKL, TokenwiseKL, GeometricTarget)  # whose weights or target have no gradient
# Finite for a teacher that gives some tokens no mass at all.
BOUNDED = [ForwardKL(), JSD(0.0), JSD(0.3), SkewedForwardKL(0.1), SkewedReverseKL(0.1),
           TotalVariation(), AlphaBetaDivergence(0.5, 0.5), GeometricTarget(0.5)]  # fmt: skip
each = pytest.mark.parametrize("divergence", ALL, ids=repr)


def random_logits(seed: int, rows: int = 4, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = random_logits(0), random_logits(1)
S, T = STUDENT.softmax(-1), TEACHER.softmax(-1)


def of_logits(divergence: Divergence, teacher: Tensor = TEACHER) -> Callable[[Tensor], Tensor]:
    return lambda logits: divergence(logits.log_softmax(-1), teacher.log_softmax(-1))


def value_and_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.clone().requires_grad_()
    value = function(at)
    (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "divergence",
    [d for d in ALL if not isinstance(d, DETACHED)],
    ids=repr,
)
def test_gradients_are_finite_differences(divergence: Divergence) -> None:
    _, gradient = value_and_gradient(of_logits(divergence), STUDENT)
    close(gradient, finite_difference(of_logits(divergence), STUDENT), atol=1e-6)
    assert gradient.abs().max() > 0.01


@each
def test_u3_zero_at_equality_and_only_there(divergence: Divergence) -> None:
    value, gradient = value_and_gradient(of_logits(divergence, STUDENT), STUDENT)
    close(value, torch.zeros(4, dtype=torch.float64))
    close(gradient, torch.zeros_like(gradient))
    assert (of_logits(divergence)(STUDENT) > 0.01).all()


@each
def test_any_leading_shape_and_no_gradient_to_the_teacher(divergence: Divergence) -> None:
    ours, theirs = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    folded = divergence(ours.view(2, 2, -1), theirs.view(2, 2, -1))
    assert torch.equal(folded.view(-1), divergence(ours, theirs))
    assert not divergence(ours, theirs).requires_grad


def test_kl_by_its_definition() -> None:
    reverse, forward = (S * (S / T).log()).sum(-1), (T * (T / S).log()).sum(-1)
    close(of_logits(ReverseKL())(STUDENT), reverse)
    close(of_logits(ForwardKL())(STUDENT), forward)
    assert ((reverse - forward).abs() > 0.01).all()
    _, gradient = value_and_gradient(of_logits(ForwardKL()), STUDENT)
    close(gradient, S - T)  # -sum_v T grad log S


def test_u13_jsd_role_of_beta_by_hand() -> None:
    """M = 0.8 (0.5, 0.3, 0.2) + 0.2 (0.1, 0.2, 0.7) = (0.42, 0.28, 0.30).

    0.2 (0.1 ln(0.1 / 0.42) + 0.2 ln(0.2 / 0.28) + 0.7 ln(0.7 / 0.30))
    + 0.8 (0.5 ln(0.5 / 0.42) + 0.3 ln(0.3 / 0.28) + 0.2 ln(0.2 / 0.30)), summed in decimals.
    """
    ours = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    theirs = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    assert JSD(0.2)(ours, theirs).item() == pytest.approx(0.097886347201046685, abs=1e-12)
    # The other convention gives beta to the student.
    assert JSD(0.8)(ours, theirs).item() == pytest.approx(0.100881747647107272, abs=1e-12)


def test_u13_jsd_ends_and_limits() -> None:
    forward, reverse = of_logits(ForwardKL())(STUDENT), of_logits(ReverseKL())(STUDENT)
    assert torch.equal(of_logits(JSD(0.0))(STUDENT), forward)
    assert torch.equal(of_logits(JSD(1.0))(STUDENT), reverse)
    close(of_logits(JSD(1e-8))(STUDENT) / 1e-8, forward, atol=1e-5)
    close(of_logits(JSD(1 - 1e-8))(STUDENT) / 1e-8, reverse, atol=1e-5)


def test_u13_jsd_half_is_symmetric_and_at_most_log_2() -> None:
    ours, theirs = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    close(JSD(0.5)(ours, theirs), JSD(0.5)(theirs, ours))
    assert (JSD(0.2)(ours, theirs) - JSD(0.2)(theirs, ours)).abs().max() > 1e-3
    apart = torch.tensor([[200.0, 0.0], [0.0, 200.0]], dtype=torch.float64).log_softmax(-1)
    assert JSD(0.5)(apart[0], apart[1]).item() == pytest.approx(math.log(2), abs=1e-12)
    assert (JSD(0.5)(ours, theirs) < math.log(2)).all()


def test_skew_0_is_the_kl() -> None:
    assert torch.equal(of_logits(SkewedForwardKL(0.0))(STUDENT), of_logits(ForwardKL())(STUDENT))
    assert torch.equal(of_logits(SkewedReverseKL(0.0))(STUDENT), of_logits(ReverseKL())(STUDENT))


def test_skew_by_its_definition() -> None:
    forward = (T * (T / (0.1 * T + 0.9 * S)).log()).sum(-1)
    close(of_logits(SkewedForwardKL(0.1))(STUDENT), forward)
    reverse = (S * (S / (0.1 * S + 0.9 * T)).log()).sum(-1)
    close(of_logits(SkewedReverseKL(0.1))(STUDENT), reverse)


def test_mixed_kl_gives_beta_to_the_reverse_kl() -> None:
    forward, reverse = of_logits(ForwardKL())(STUDENT), of_logits(ReverseKL())(STUDENT)
    for beta in (0.0, 0.3, 1.0):
        close(of_logits(MixedKL(beta))(STUDENT), (1 - beta) * forward + beta * reverse)
    assert MixedKL() == MixedKL(0.5)  # NeMo-RL's


def test_total_variation_by_hand() -> None:
    ours = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    theirs = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    assert TotalVariation()(ours, theirs).item() == pytest.approx(0.5, abs=1e-12)


def test_akl_weighs_both_kls_by_where_the_gap_is() -> None:
    """The teacher's two likeliest of 0.4, 0.3, 0.2, 0.1 have a mass of 0.7."""
    theirs = torch.tensor([[0.2, 0.4, 0.1, 0.3]], dtype=torch.float64)
    ours = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    student, teacher = ours.log(), theirs.log()
    for head, weight in ((0.0, 0.1 / 0.6), (0.5, 0.1 / 0.6), (0.75, 0.3 / 0.6), (1.0, 1.0)):
        value, gradient = value_and_gradient(of_logits(AdaptiveKL(head), teacher), student)
        forward, slope = value_and_gradient(of_logits(ForwardKL(), teacher), student)
        reverse, other = value_and_gradient(of_logits(ReverseKL(), teacher), student)
        close(value, weight * forward + (1 - weight) * reverse)
        close(gradient, weight * slope + (1 - weight) * other)


def test_the_head_of_akl_has_at_most_its_mass() -> None:
    """The teacher's two likeliest of 1/2, 1/4, 1/8, 1/8 have exactly 3/4: a head of 3/4."""
    theirs = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    ours = torch.tensor([[0.25, 0.25, 0.375, 0.125]], dtype=torch.float64)
    student, teacher = ours.log(), theirs.log()
    gaps = [0.25, 0.0, 0.25, 0.0]
    assert gaps == (ours - theirs).abs()[0].tolist()
    forward, reverse = ForwardKL()(student, teacher), ReverseKL()(student, teacher)
    close(AdaptiveKL(0.875)(student, teacher), forward)
    close(AdaptiveKL(0.75)(student, teacher), (forward + reverse) / 2)


def test_todi_weighs_both_kls_token_by_token() -> None:
    weight = T / (S + T)  # the sigmoid of the log-ratio
    value, gradient = value_and_gradient(of_logits(TokenwiseKL()), STUDENT)
    ratio = (T / S).log()
    close(value, (weight * T * ratio - (1 - weight) * S * ratio).sum(-1))

    def with_fixed_weights(logits: Tensor) -> Tensor:
        ours = logits.log_softmax(-1)
        theirs = TEACHER.log_softmax(-1)
        terms = weight * T * (theirs - ours) + (1 - weight) * ours.exp() * (ours - theirs)
        return terms.sum(-1)

    close(gradient, finite_difference(with_fixed_weights, STUDENT), atol=1e-6)


def test_alpha_beta_by_its_definition_and_its_limits() -> None:
    both = T**0.3 * S**0.6 - (0.3 * T**0.9 + 0.6 * S**0.9) / 0.9
    close(of_logits(AlphaBetaDivergence(0.3, 0.6))(STUDENT), -both.sum(-1) / 0.18)
    for near, end, kl in (
        (AlphaBetaDivergence(1.0, 1e-6), AlphaBetaDivergence(1.0, 0.0), ForwardKL()),
        (AlphaBetaDivergence(1e-6, 1.0), AlphaBetaDivergence(0.0, 1.0), ReverseKL()),
    ):
        close(of_logits(end)(STUDENT), of_logits(kl)(STUDENT))
        close(of_logits(near)(STUDENT), of_logits(kl)(STUDENT), atol=1e-4)
    # The code of the authors where one parameter is 0 and the other is not 1.
    power = (T**2 * (T**2 / S**2).log() - T**2 + S**2).sum(-1) / 2
    close(of_logits(AlphaBetaDivergence(2.0, 0.0))(STUDENT), power)


@pytest.mark.parametrize("other", [0.2, 0.5, 1.0, 2.0])
def test_alpha_beta_jumps_to_its_ends_by_the_other_parameter(other: float) -> None:
    """The formula's limit is the authors' special case divided by the other parameter."""
    for near, end in (((other, 1e-6), (other, 0.0)), ((1e-6, other), (0.0, other))):
        limit, special = (of_logits(AlphaBetaDivergence(*pair))(STUDENT) for pair in (near, end))
        torch.testing.assert_close(limit, special / other, atol=0, rtol=1e-4)


def test_a_clip_bounds_each_token_of_the_vocabulary() -> None:
    terms = T * (T / S).log()
    found, gradient = value_and_gradient(of_logits(JSD(0.0, clip=0.1)), STUDENT)
    close(found, terms.clamp(max=0.1).sum(-1))
    # Of -sum T log S the clipped tokens are left out.
    left = torch.where(terms > 0.1, 0.0, T)
    close(gradient, left.sum(-1, keepdim=True) * S - left)


def test_a_geometric_target_is_chased_without_moving() -> None:
    for teacher, student in ((1.0, 0.8), (0.4, 0.6), (1.0, 0.0)):
        product = T**teacher * S**student
        target = product / product.sum(-1, keepdim=True)
        forward = GeometricTarget(teacher, student)
        value, gradient = value_and_gradient(of_logits(forward), STUDENT)
        close(value, (target * (target / S).log()).sum(-1))
        close(gradient, S - target)
        backward = GeometricTarget(teacher, student, "reverse")
        _, gradient = value_and_gradient(of_logits(backward), STUDENT)
        fixed = of_logits(ReverseKL(), target.log())
        close(gradient, finite_difference(fixed, STUDENT), atol=1e-6)


def test_a_target_moves_with_the_step() -> None:
    taid = GeometricTarget(teacher=Linear(start=0.4, end=1.0, steps=10))
    assert (taid.at(5).teacher, taid.at(5).student) == pytest.approx((0.7, 0.3))
    close(of_logits(taid.at(10))(STUDENT), of_logits(ForwardKL())(STUDENT))
    veto = GeometricTarget(student=Linear(start=0.8, end=0.0, steps=4), direction="reverse")
    assert (veto.at(1).teacher, veto.at(1).student) == pytest.approx((1.0, 0.6))
    close(of_logits(veto.at(4))(STUDENT), of_logits(ReverseKL())(STUDENT))
    assert ReverseKL().at(3) == ReverseKL()


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_skew_bounds_the_log_ratio(alpha: float) -> None:
    """Disjoint models reach -log alpha, a token's log-ratio at its largest; nothing exceeds it."""
    apart = torch.tensor([[300.0, 0.0], [0.0, 300.0]], dtype=torch.float64).log_softmax(-1)
    for divergence in (SkewedForwardKL(alpha), SkewedReverseKL(alpha)):
        largest = divergence(apart[0], apart[1]).item()
        assert largest == pytest.approx(-math.log(alpha), abs=1e-12)
        assert (of_logits(divergence)(STUDENT) < largest).all()


@pytest.mark.parametrize("divergence", BOUNDED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_without_mass_on_some_tokens(divergence: Divergence, dtype: torch.dtype) -> None:
    """0 log 0 = 0: as a teacher of next to no mass there, without NaN."""
    banned = torch.zeros(4, VOCABULARY, dtype=torch.bool)
    banned[:, 2:4] = True
    student = STUDENT.to(dtype)
    none = TEACHER.masked_fill(banned, -torch.inf).to(dtype)
    hardly = TEACHER.masked_fill(banned, -80.0).to(dtype)
    value, gradient = value_and_gradient(of_logits(divergence, none), student)
    expected, slope = value_and_gradient(of_logits(divergence, hardly), student)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=0)


@each
def test_a_token_neither_model_can_say(divergence: Divergence) -> None:
    """Vocabulary entries with logit -inf on both sides are as good as absent."""
    filler = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    padded = torch.cat([TEACHER, filler], dim=-1)
    value, gradient = value_and_gradient(
        of_logits(divergence, padded), torch.cat([STUDENT, filler], dim=-1)
    )
    expected, slope = value_and_gradient(of_logits(divergence), STUDENT)
    close(value, expected)
    close(gradient, torch.cat([slope, torch.zeros_like(filler)], dim=-1))


def test_reverse_kl_is_infinite_where_the_teacher_has_no_mass() -> None:
    theirs = TEACHER.masked_fill(torch.arange(VOCABULARY) == 2, -torch.inf).log_softmax(-1)
    assert ReverseKL()(STUDENT.log_softmax(-1), theirs).isposinf().all()


def test_t4_two_privileged_teachers_teach_their_geometric_mean() -> None:
    """With hints hidden from the student, the mean reverse KL has one optimum (2605.11182)."""
    teachers = random_logits(5, rows=2).log_softmax(-1)
    logits = torch.zeros(VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = ReverseKL()(logits.log_softmax(-1).expand(2, -1), teachers).mean()
        value.backward()
        return value

    optimiser.step(loss)
    learnt = logits.detach().softmax(-1)
    close(learnt, teachers.mean(dim=0).softmax(-1), atol=1e-6)
    assert (learnt - teachers.exp().mean(dim=0)).abs().max() > 0.01  # not the marginal


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_jsd_is_that_of_trl(
    beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    def theirs(logits: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(
            logits, TEACHER, beta=beta, temperature=temperature, reduction="none"
        ).sum(-1)

    def ours(logits: Tensor) -> Tensor:
        return of_logits(JSD(beta), TEACHER / temperature)(logits / temperature)

    value, gradient = value_and_gradient(ours, STUDENT)
    expected, slope = value_and_gradient(theirs, STUDENT)
    close(value, expected, atol=1e-5)
    close(gradient, slope, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(1.5), "JSD: beta is 1.5, expected a number from 0 to 1"),
        (lambda: JSD(math.nan), "JSD: beta is nan, expected a number from 0 to 1"),
        (lambda: AdaptiveKL(1.5), "AdaptiveKL: head is 1.5, expected a number from 0 to 1"),
        (lambda: SkewedForwardKL(1.0), "SkewedForwardKL: alpha is 1.0, expected"),
        (lambda: SkewedReverseKL(-0.1), "SkewedReverseKL: alpha is -0.1, expected"),
        (lambda: JSD(clip=0.0), "JSD: clip is 0.0"),
        (lambda: MixedKL(-1.0), "MixedKL: beta is -1.0"),
        (lambda: AlphaBetaDivergence(-0.1, 1.0), "AlphaBetaDivergence: alpha is -0.1"),
        (lambda: AlphaBetaDivergence(0.0, 0.0), "AlphaBetaDivergence: alpha and beta are 0"),
        (lambda: GeometricTarget(0.0), "GeometricTarget: teacher is 0.0"),
        (lambda: GeometricTarget(1.5), "GeometricTarget: student is -0.5"),
    ],
)
def test_weights_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


class Consumer:
    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence


def test_a_configuration_names_them() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Consumer, "consumer")
    chosen = {"class_path": "opd_lightning.losses.divergence.JSD", "init_args": {"beta": 0.2}}
    config = parser.parse_object({"consumer": {"divergence": chosen}})
    assert parser.instantiate(config).consumer.divergence == JSD(0.2)
