"""Rules that are baselines or controls: outcomes added, rollouts kept, weights of SFT, chance."""

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Linear
from opd_lightning.rules import (
    AddOutcome,
    EntropyWeight,
    HighEntropyMask,
    InDistributionWeight,
    LateWeight,
    LikelihoodMask,
    LikelihoodWeight,
    OnlyCorrect,
    PowerReward,
    RandomGate,
    ReliableExtrapolation,
    SignGate,
    TeacherEntropyMask,
)
from tests.toy import applied, make_scored, opd_signal, score_of

STUDENT = torch.tensor([[-1.0, -2.0], [-0.5, -3.0], [-1.5, -0.1]], dtype=torch.float64)
TEACHER = torch.tensor([[-0.5, -2.5], [-1.5, -1.0], [-1.5, -0.2]], dtype=torch.float64)


def test_the_outcome_is_added_once_per_token() -> None:
    scored = make_scored(STUDENT[:2], TEACHER[:2], rewards=[1.0, 0.0])
    signal, rates = applied(AddOutcome(0.5, normalise_std=False), scored)
    torch.testing.assert_close(
        signal.advantage, (TEACHER - STUDENT)[:2] + 0.5 * torch.tensor([[0.5], [-0.5]])
    )
    assert rates["add_outcome/size"].unique().tolist() == [0.25]
    plain, _ = applied(AddOutcome(0.0), scored)
    assert torch.equal(plain.advantage, opd_signal(scored).advantage)
    falling = Linear(start=1.0, end=0.0, steps=4)
    later = make_scored(STUDENT[:2], TEACHER[:2], rewards=[1.0, 0.0], step=3)
    added = applied(AddOutcome(falling), later)[0].advantage - later.log_ratio
    torch.testing.assert_close(  # whitened: (R - mean) / std is 1 and -1
        added[:, 0], torch.tensor([0.25, -0.25], dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_rollouts_are_kept_by_their_score() -> None:
    scored = make_scored(STUDENT, TEACHER, rewards=[1.0, 0.0, torch.nan])
    assert applied(OnlyCorrect(), scored)[0].mask[:, 0].tolist() == [True, False, False]
    partial = make_scored(STUDENT, TEACHER, rewards=[0.5, 0.4, 0.9])
    assert applied(OnlyCorrect(), partial)[0].mask[:, 0].tolist() == [True, False, True]
    strict = applied(OnlyCorrect(threshold=0.9), partial)[0]
    assert strict.mask[:, 0].tolist() == [False, False, True]
    wrong, rates = applied(OnlyCorrect(keep="wrong"), scored)
    assert wrong.mask[:, 0].tolist() == [False, True, False]
    assert rates["only_correct/kept"][:, 0].tolist() == [0, 1, 0]


def test_likelihood_weights_take_the_inverse_probability_out_of_the_gradient() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    logprob = logits.log_softmax(-1)[2]
    scored = make_scored(logprob.detach()[None, None], logprob.detach()[None, None])
    for form, factor in (("p", 1.0), ("p(1-p)", 1 - logprob.exp())):
        signal, _ = applied(LikelihoodWeight(form), scored)  # type: ignore[arg-type]
        (of_loss,) = torch.autograd.grad(
            (signal.weight * -logprob).sum(), logits, retain_graph=True
        )
        (of_p,) = torch.autograd.grad(logits.softmax(-1)[2], logits, retain_graph=True)
        torch.testing.assert_close(of_loss, -of_p * factor)


def test_a_power_of_the_likelihood_is_the_gradient_of_its_loss() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    logprob = logits.log_softmax(-1)[2]
    scored = make_scored(logprob.detach()[None, None], logprob.detach()[None, None])
    signal, _ = applied(LikelihoodWeight(power=3.0), scored)
    (found,) = torch.autograd.grad((signal.weight * -logprob).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((1 - (3 * logprob).exp()) / 3, logits)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="power"):
        LikelihoodWeight("p(1-p)", power=2.0)


def test_idft_weighs_by_the_centred_log_likelihood() -> None:
    """The mean of CLL under the student is 0; surprising tokens have a larger exponent."""
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    entropy = -(probs * probs.log()).sum()
    scored = make_scored(
        probs.log()[None], probs.log()[None], entropy=entropy.expand(1, 3).contiguous()
    )
    signal, rates = applied(InDistributionWeight(high=9.0), scored)
    centred = probs.log() + entropy
    assert (probs * centred).sum().item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(rates["in_distribution_weight/centred"], centred[None])
    torch.testing.assert_close(signal.weight, (probs ** (-centred).exp())[None])
    cooler, _ = applied(InDistributionWeight(temperature=2.0, high=9.0), scored)
    torch.testing.assert_close(cooler.weight, (probs ** (-centred / 2).exp())[None])
    published, _ = applied(InDistributionWeight(), scored)
    exponent = (-centred).exp().clamp(0.1, 2.0)
    torch.testing.assert_close(published.weight, (probs**exponent)[None])
    bounded, _ = applied(InDistributionWeight(low=1.0, high=1.0), scored)
    torch.testing.assert_close(bounded.weight, probs[None])  # DFT


def test_eaft_weighs_by_the_relative_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ((name, compare),) = EntropyWeight().comparisons().items()
    assert compare.other is None
    value = compare.function(logits.log_softmax(-1), None)
    torch.testing.assert_close(value, torch.tensor([1.0, 0.0], dtype=torch.float64))
    scored = make_scored(STUDENT[:1], TEACHER[:1], values={name: value[None]})
    assert torch.equal(applied(EntropyWeight(), scored)[0].weight, value[None])


def test_likely_tokens_are_kept() -> None:
    scored = make_scored(STUDENT, TEACHER)
    p = STUDENT.exp()
    assert torch.equal(applied(LikelihoodMask(least=0.3), scored)[0].mask, p >= 0.3)
    assert torch.equal(applied(LikelihoodMask(most=0.3), scored)[0].mask, p <= 0.3)
    certain = make_scored(torch.zeros(1, 1), torch.zeros(1, 1))
    assert applied(LikelihoodMask(least=1.0, most=1.0), certain)[0].mask.all()  # both included
    with pytest.raises(UserError, match="least"):
        LikelihoodMask(least=0.5, most=0.4)


def test_tokens_are_kept_by_the_teacher_s_entropy_not_the_student_s() -> None:
    entropy = torch.tensor([[0.1, 2.0], [0.8, 0.0], [3.0, 0.9]], dtype=torch.float64)
    scored = make_scored(STUDENT, TEACHER, entropy=torch.zeros_like(entropy))
    scored.others["teacher"] = score_of(TEACHER, entropy)  # type: ignore[index]
    sure, _ = applied(TeacherEntropyMask(), scored)
    assert sure.mask.tolist() == [[True, False], [True, True], [False, False]]
    unsure, _ = applied(TeacherEntropyMask(keep="above"), scored)
    assert torch.equal(unsure.mask, ~sure.mask)


# RandomGate ----------------------------------------------------------------------------------


def big(rows: int = 200, length: int = 20, step: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 60, (rows, length), generator=generator)
    return torch.full((rows, length), -1.0), torch.full((rows, length), -0.5), ids


def test_a_random_gate_chooses_its_share_of_tokens_or_rollouts() -> None:
    student, teacher, ids = big()
    scored = make_scored(student, teacher, ids=ids, groups=list(range(200)))
    tokens = applied(RandomGate(0.3), scored)[0].mask.double()
    assert tokens.mean().item() == pytest.approx(0.3, abs=0.03)
    assert tokens.mean(1).var() > 0
    rows = applied(RandomGate(0.3, per="rollout"), scored)[0].mask
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows[:, 0].double().mean().item() == pytest.approx(0.3, abs=0.1)
    assert applied(RandomGate(0.0), scored)[0].mask.sum() == 0
    assert applied(RandomGate(1.0), scored)[0].mask.all()


def test_its_choice_depends_on_nothing_but_its_coordinates() -> None:
    student, teacher, ids = big(6)
    groups = [0, 0, 1, 1, 2, 2]

    def chosen(rows: slice, seed: int = 0, step: int = 0) -> torch.Tensor:
        scored = make_scored(
            student[rows], teacher[rows], ids=ids[rows], groups=groups[rows], step=step
        )
        return applied(RandomGate(0.5, seed=seed), scored)[0].mask

    whole = chosen(slice(0, 6))
    assert torch.equal(torch.cat([chosen(slice(0, 2)), chosen(slice(2, 6))]), whole)
    assert not torch.equal(chosen(slice(0, 6), seed=1), whole)
    assert not torch.equal(chosen(slice(0, 6), step=1), whole)
    assert not torch.equal(whole[0], whole[1])


def test_it_draws_alike_behind_padding_and_anew_for_each_prompt() -> None:
    student, teacher, ids = big(1)
    ids = ids.expand(3, -1).clone()  # one response to the prompts 0, 1 and 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 15:] = False
    ids[2, 15:] = 0  # other padding
    twice, again = student.expand(3, -1), teacher.expand(3, -1)
    whole = make_scored(twice, again, ids=ids, mask=mask, groups=[0, 1, 0])
    narrow = make_scored(twice[:, :15], again[:, :15], ids=ids[:, :15], groups=[0, 1, 0])
    one, other = (applied(RandomGate(0.5), scored)[0].mask[:, :15] for scored in (whole, narrow))
    assert torch.equal(one, other)
    assert torch.equal(one[0], one[2])
    assert not torch.equal(one[0], one[1])


def test_with_plain_others_it_is_a_sign_gate_that_does_not_look() -> None:
    """All chosen is the sign gate's consensus everywhere, none chosen plain OPD."""
    reference = TEACHER - 1
    scored = make_scored(STUDENT, TEACHER, reference=reference, rewards=[1.0, 0.0, 1.0])
    extrapolated = opd_signal(scored)
    signal = type(extrapolated)(
        advantage=scored.log_ratio + 0.8, weight=extrapolated.weight, mask=extrapolated.mask
    )
    everywhere, _ = applied(RandomGate(1.0, others="plain"), scored, signal)
    nowhere, _ = applied(RandomGate(0.0, others="plain"), scored, signal)
    assert torch.equal(everywhere.advantage, signal.advantage)
    assert torch.equal(nowhere.advantage, scored.log_ratio)
    gate, rates = applied(SignGate(scale=1.8), scored)
    consensus = rates["sign_gate/consensus"].bool()
    torch.testing.assert_close(gate.advantage[consensus], signal.advantage[consensus])
    assert RandomGate(0.5, others="plain").needs == ("teacher",)
    assert RandomGate(0.5).needs == ()


@pytest.mark.parametrize("share", [-0.1, 1.1, torch.nan])
def test_a_share_is_a_probability(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        RandomGate(share)


def test_the_surest_tokens_are_dropped() -> None:
    entropy = torch.tensor([[0.1, 2.0], [0.8, 0.5], [3.0, 0.9]], dtype=torch.float64)
    scored = make_scored(STUDENT, TEACHER, entropy=entropy)
    signal, rates = applied(HighEntropyMask(share=0.2), scored)
    assert signal.mask.tolist() == [[False, True], [False, False], [True, False]]
    assert torch.equal(rates["high_entropy_mask/kept"].bool(), signal.mask)
    assert applied(HighEntropyMask(share=1.0), scored)[0].mask.all()
    with pytest.raises(UserError, match="share"):
        HighEntropyMask(share=0.0)


def test_power_rewards_have_the_sign_of_d_and_its_limit() -> None:
    scored = make_scored(STUDENT, TEACHER)
    found = applied(PowerReward(alpha=2.0), scored)[0].advantage
    torch.testing.assert_close(found, TEACHER.exp() ** 2 - STUDENT.exp() ** 2)
    assert torch.equal(found.sign(), (TEACHER - STUDENT).sign())
    small = applied(PowerReward(alpha=1e-6), scored)[0].advantage / 1e-6
    torch.testing.assert_close(small, TEACHER - STUDENT, atol=1e-5, rtol=0)


def test_extrapolation_goes_where_both_models_agree() -> None:
    reference = STUDENT - 0.25
    scored = make_scored(STUDENT, TEACHER, reference=reference)
    d = TEACHER - STUDENT
    q = (-(d.exp() - 1 - d) / 0.5).exp()
    signal, rates = applied(ReliableExtrapolation(gamma=0.8, tau=0.5), scored)
    torch.testing.assert_close(signal.advantage, d + 0.8 * q * (TEACHER - reference))
    torch.testing.assert_close(rates["extrapolation/reliability"], q)
    same = make_scored(STUDENT, STUDENT, reference=reference)  # q is 1: G-OPD's advantage
    extrapolated = applied(ReliableExtrapolation(gamma=0.8), same)[0].advantage
    torch.testing.assert_close(extrapolated, 0.8 * (STUDENT - reference))
    plain = applied(ReliableExtrapolation(gamma=0.0), scored)[0].advantage
    assert torch.equal(plain, d)
    rising = Linear(start=0.0, end=0.8, steps=4)
    later = make_scored(STUDENT, TEACHER, reference=reference, step=4)
    scheduled = applied(ReliableExtrapolation(rising, tau=0.5), later)[0].advantage
    assert torch.equal(scheduled, signal.advantage)


def test_late_weights_rise_over_a_response_of_any_length() -> None:
    d = torch.zeros(2, 10, dtype=torch.float64)
    mask = torch.arange(10)[None] < torch.tensor([[10], [5]])
    scored = make_scored(d, d, mask=mask)
    weight = applied(LateWeight(), scored)[0].weight
    relative = torch.arange(10, dtype=torch.float64) / 10
    expected = 0.25 + 0.75 * torch.sigmoid((relative - 0.3) / 0.1)
    torch.testing.assert_close(weight[0], expected)
    torch.testing.assert_close(weight[1, :5], expected[::2])
    assert (weight[1, 5:] == 1).all()
    assert (applied(LateWeight(least=1.0), scored)[0].weight == 1).all()
