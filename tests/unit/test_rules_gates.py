"""Gates: truth tables (U7, U17), and the methods that they reduce to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import extrapolated
from opd_lightning.losses.reduction import aggregate
from opd_lightning.rules.base import Scored
from opd_lightning.rules.gates import CorrectnessGate, GroupGate, SignGate, TrajectoryGate
from opd_lightning.rules.weights import StabilityWeight
from opd_lightning.types import Totals
from tests.toy import applied, make_scored, opd_signal, surrogate_loss

MIXED = [1.0, 0.0, 1.0, 0.0]


def column(*values: float) -> Tensor:
    """One token a row."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def of_ratio(ratio: Tensor, rewards: list[float], reward_over_reference: float = 1.0) -> Scored:
    """Scores whose d_t is `ratio` and whose log pi_T - log pi_ref is a constant."""
    student = torch.full_like(ratio, -1.0)
    teacher = student + ratio
    return make_scored(student, teacher, rewards=rewards, reference=teacher - reward_over_reference)


def random_scored(rewards: list[float], seed: int = 0, length: int = 6) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(rewards), length)
    student, teacher, reference = -4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    teacher[:, 0] = student[:, 0]  # a2 = 0
    return make_scored(student, teacher, rewards=rewards, reference=reference)


# SignGate ------------------------------------------------------------------------------


def test_u7_truth_table() -> None:
    """Correct / wrong rollout x teacher likes the token more / less; scale 3, beta 1/2."""
    scored = of_ratio(column(2.0, 2.0, -4.0, -4.0), [1.0, 0.0, 1.0, 0.0])
    signal, rates = applied(SignGate(scale=3.0, beta=0.5), scored)
    # The extrapolated part is +2; the wrong rollout's consensus is pushed down, less far.
    assert signal.advantage.flatten().tolist() == [4.0, 1.0, -2.0, -2.0]
    assert rates["sign_gate/consensus"].flatten().tolist() == [1, 0, 0, 1]
    assert rates["sign_gate/conflict"].flatten().tolist() == [0, 1, 1, 0]
    assert rates["sign_gate/degenerate"].sum() == 0


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0]])
def test_u7_a_degenerate_group_is_softened_opd(rewards: list[float]) -> None:
    scored = of_ratio(column(2.0, -4.0), rewards)
    signal, rates = applied(SignGate(scale=3.0, beta=0.5), scored)
    assert signal.advantage.flatten().tolist() == [1.0, -2.0]
    assert rates["sign_gate/degenerate"].tolist() == [[1], [1]]
    assert rates["sign_gate/conflict"].sum() == rates["sign_gate/consensus"].sum() == 0


@pytest.mark.parametrize("rewards", [MIXED, [1.0, 1.0, 1.0, 1.0], [0.2, 0.9, 0.9, 0.1]])
def test_u7_beta_1_and_scale_1_is_opd(rewards: list[float]) -> None:
    scored = random_scored(rewards)
    signal, _ = applied(SignGate(scale=1.0, beta=1.0), scored)
    assert torch.equal(signal.advantage, scored.log_ratio)


def test_u7_consensus_everywhere_is_exopd() -> None:
    ratio = column(2.0, -4.0, 0.5, -0.1)
    scored = of_ratio(ratio, MIXED)
    signal, rates = applied(SignGate(scale=1.8, beta=0.0), scored)
    everywhere = extrapolated(
        scored.teacher.logprobs, scored.student.logprobs, scored.others["reference"].logprobs, 1.8
    )
    assert torch.equal(signal.advantage, everywhere)
    assert rates["sign_gate/consensus"].min() == 1
    assert not torch.equal(everywhere, ratio)


def test_u7_beta_0_and_degenerate_groups_teach_nothing() -> None:
    scored = random_scored([1.0] * 4)
    student = scored.student.logprobs.clone().requires_grad_()
    signal, _ = applied(SignGate(beta=0.0), scored)
    surrogate_loss(student, signal).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_u7_other_rewards_swap_consensus_and_conflict() -> None:
    _, rates = applied(SignGate(), random_scored(MIXED))
    _, swapped = applied(SignGate(), random_scored([1 - r for r in MIXED]))
    assert torch.equal(rates["sign_gate/consensus"], swapped["sign_gate/conflict"])
    assert torch.equal(rates["sign_gate/conflict"], swapped["sign_gate/consensus"])
    assert 0 < rates["sign_gate/consensus"].mean() < 1
    neither = rates["sign_gate/consensus"] + rates["sign_gate/conflict"] == 0
    assert torch.equal(neither, random_scored(MIXED).log_ratio == 0)


@pytest.mark.parametrize(("fallback", "expected"), [("preserve", -4.0), ("grpo", 1.0)])
def test_fallbacks(fallback: str, expected: float) -> None:
    scored = of_ratio(column(-4.0, -4.0), [1.0, 0.0])
    rule = SignGate(fallback=fallback)  # type: ignore[arg-type]
    signal, _ = applied(rule, scored)
    assert signal.advantage[0].item() == pytest.approx(expected, abs=1e-5)  # epsilon beside std


def test_flips_are_consensus_tokens_that_end_up_pushed_the_other_way() -> None:
    # The reference likes all tokens more than the teacher does, by 1 nat.
    scored = of_ratio(column(0.5, 0.5, 1.0, -1.0), MIXED, reward_over_reference=-1.0)
    signal, rates = applied(SignGate(scale=2.0), scored)
    assert signal.advantage.flatten().tolist() == [-0.5, 0.5, 0.0, -2.0]
    assert rates["sign_gate/flip"].flatten().tolist() == [1, 0, 0, 0]


def test_a_reference_is_needed_only_to_extrapolate() -> None:
    assert SignGate().needs == ("teacher", "reference")
    assert SignGate(scale=1.0).needs == ("teacher",)


def test_the_gate_does_not_see_the_stability_weight() -> None:
    scored = random_scored(MIXED)
    gated, _ = applied(SignGate(), scored)
    weighed, _ = applied(StabilityWeight(tau=0.5), scored)
    both, _ = applied(SignGate(), scored, weighed)
    assert torch.equal(both.advantage, gated.advantage)
    assert torch.equal(both.weight, weighed.weight)
    assert not torch.equal(both.weight, gated.weight)


# CorrectnessGate and GroupGate ---------------------------------------------------------


def test_opdvr_by_hand() -> None:
    scored = of_ratio(column(2.0, -4.0, 2.0, -4.0), [1.0, 1.0, 0.0, 0.0])
    signal, rates = applied(CorrectnessGate(), scored)
    assert signal.advantage.flatten().tolist() == [2.0, 0.0, 0.0, -4.0]
    assert rates["correctness_gate/zeroed"].flatten().tolist() == [0, 1, 1, 0]


def test_u7_sg_opd_0_1_is_opdvr_and_grpd_on_mixed_groups() -> None:
    scored = random_scored(MIXED)
    gated = [
        applied(rule, scored)[0].advantage
        for rule in (SignGate(scale=1.0, beta=0.0), CorrectnessGate(), GroupGate())
    ]
    assert torch.equal(gated[0], gated[1])
    assert torch.equal(gated[1], gated[2])
    assert 0 < (gated[0] == 0).double().mean() < 1


def test_opdvr_of_a_correct_and_of_a_wrong_rollout_add_up_to_opd() -> None:
    correct, wrong = random_scored([1.0] * 4), random_scored([0.0] * 4)
    total = sum(applied(CorrectnessGate(), one)[0].advantage for one in (correct, wrong))
    assert isinstance(total, Tensor)
    assert torch.equal(total, correct.log_ratio)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_train_in_opdvr_and_not_in_grpd(reward: float) -> None:
    scored = random_scored([reward] * 4)
    assert applied(CorrectnessGate(), scored)[0].advantage.abs().max() > 0
    assert applied(GroupGate(), scored)[0].advantage.abs().max() == 0


def test_partial_rewards_have_a_threshold() -> None:
    scored = of_ratio(column(-1.0, -1.0), [0.5, 0.4])
    assert applied(CorrectnessGate(), scored)[0].advantage.flatten().tolist() == [0.0, -1.0]
    strict = CorrectnessGate(threshold=0.6)
    assert applied(strict, scored)[0].advantage.flatten().tolist() == [-1.0, -1.0]


def test_a_rollout_without_a_score_keeps_its_advantage() -> None:
    scored = make_scored(column(-1.0, -1.0), column(-2.0, 0.0))
    assert applied(CorrectnessGate(), scored)[0].advantage.flatten().tolist() == [-1.0, 1.0]


# TrajectoryGate ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "gap", "kept"),
    [
        ([1.0, 0.0], 0.5, [True, False]),
        ([1.0, 0.0], -0.5, [False, True]),
        ([1.0, 1.0], 0.5, [False, False]),  # A = 0 counts as a failure
        ([1.0, 1.0], -0.5, [True, True]),
        ([1.0, 0.0], 0.0, [False, False]),  # equality is dropped
    ],
)
def test_u17_gate_table(rewards: list[float], gap: float, kept: list[bool]) -> None:
    ratio = torch.tensor([[2.0, gap - 2.0]] * 2, dtype=torch.float64)
    signal, rates = applied(TrajectoryGate(), of_ratio(ratio, rewards))
    assert signal.mask.tolist() == [[k, k] for k in kept]
    assert rates["trajectory_gate/kept"].tolist() == [[float(k)] * 2 for k in kept]


def test_u17_margin() -> None:
    scored = of_ratio(column(0.5, -0.5, 0.6, -0.6), MIXED)
    signal, _ = applied(TrajectoryGate(margin=0.5), scored)
    assert signal.mask.flatten().tolist() == [False, False, True, True]


def test_u17_sums_only_what_takes_part() -> None:
    scored = of_ratio(torch.tensor([[1.0, -9.0], [-1.0, 9.0]], dtype=torch.float64), [1.0, 0.0])
    first = torch.tensor([[True, False]] * 2)
    signal, _ = applied(TrajectoryGate(), scored, opd_signal(scored, first))
    assert signal.mask.tolist() == first.tolist()


def test_u17_nothing_kept_is_a_loss_of_0() -> None:
    scored = of_ratio(column(-1.0, 1.0), [1.0, 0.0])
    signal, _ = applied(TrajectoryGate(), scored)
    assert not signal.mask.any()
    student = scored.student.logprobs.clone().requires_grad_()
    loss = aggregate(surrogate_loss(student, signal), signal.mask, Totals(0, 2), "mask-mean")
    loss.backward()
    assert student.grad is not None
    assert loss.item() == student.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignGate(beta=1.5), r"SignGate: beta is 1.5, expected a number in \[0, 1\]"),
        (
            lambda: SignGate(fallback="grpo", beta=0.5),
            "SignGate: beta is 0.5, expected 1, or fallback 'interp': 'grpo' does not read it",
        ),
        (lambda: SignGate(scale=float("nan")), "SignGate: scale is nan, expected"),
        (lambda: CorrectnessGate(threshold=0.0), "CorrectnessGate: threshold is 0.0, expected"),
        (lambda: TrajectoryGate(margin=-1.0), "TrajectoryGate: margin is -1.0, expected"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
