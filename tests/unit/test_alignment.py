"""Models with different tokenizers: groups as actions, merged distributions, losses; float64."""

import torch
from torch import Tensor

from opd_lightning.losses.advantage import extrapolated
from opd_lightning.losses.alignment import (
    HybridULD,
    Pairs,
    group_ends,
    hybrid_uld,
    in_groups,
    uld,
)
from opd_lightning.losses.divergence import JSD, ReverseKL
from opd_lightning.models.tokenization import align
from tests.merged import merge
from tests.toy import (
    LENGTH,
    SEQUENCES,
    expected_gradient,
    finite_difference,
    policy_gradient,
    random_logits,
    token_logprobs,
)

VOCABULARY = 6


def random_logprobs(seed: int, rows: int, size: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).log_softmax(-1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_u22_the_same_tokenizer_gives_the_jsd() -> None:
    tokens = [b"na", b"\xc3", b"\xafve", b" ", b"42"]
    groups = align(tokens, tokens)
    assert [(len(group.student), len(group.teacher)) for group in groups] == [(1, 1)] * 5
    ids = torch.arange(5)
    student = random_logprobs(0, 5).requires_grad_()
    teacher = random_logprobs(1, 5)
    ours = merge(student, ids, [group.student for group in groups])
    theirs = merge(teacher, ids, [group.teacher for group in groups])
    all_ids = torch.arange(VOCABULARY)
    pairs = Pairs.of(all_ids, all_ids, (VOCABULARY, VOCABULARY))
    loss = hybrid_uld(ours, theirs, pairs, JSD(0.5))
    expected = JSD(0.5)(student, teacher)
    close(loss.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    close(gradient, torch.autograd.grad(expected.sum(), student)[0])
    assert (expected > 0.01).all()


def test_merging_is_the_chain_rule() -> None:
    """A model of two tokens by its joint distribution; the response is (1, 2)."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    joint /= joint.sum()
    first = joint.sum(dim=1)
    logprobs = torch.stack([first, joint[1] / first[1]]).log()
    close(merge(logprobs, torch.tensor([1, 2]), [range(2)]).exp(), joint[1:2])


def test_uld_by_hand() -> None:
    ours = torch.tensor([[0.1, 0.9], [0.5, 0.5]], dtype=torch.float64)
    theirs = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5]], dtype=torch.float64)
    # |0.9 - 0.7| + |0.1 - 0.2| + |0 - 0.1|
    close(uld(ours, theirs), torch.tensor([0.4, 0.0], dtype=torch.float64))
    close(uld(theirs, ours), torch.tensor([0.4, 0.0], dtype=torch.float64))


def test_u22_permuting_the_teachers_vocabulary_leaves_uld_unchanged() -> None:
    student, teacher = random_logprobs(0, 4), random_logprobs(1, 4, size=9)
    permuted = teacher[:, torch.randperm(9, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(uld(student.exp(), teacher.exp()), uld(student.exp(), permuted.exp()))
    assert (uld(student.exp(), teacher.exp()) > 0.01).all()
    # As part of the hybrid loss too, as long as shared tokens are found where they are now.
    pair = Pairs.of(torch.tensor([0]), torch.tensor([0]), (VOCABULARY, 9))
    moved = torch.tensor([0, *range(8, 0, -1)])
    loss = hybrid_uld(student, teacher, pair, JSD())
    close(hybrid_uld(student, teacher[:, moved], pair, JSD()), loss)


def test_hybrid_by_hand() -> None:
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64)
    pair = Pairs.of(torch.tensor([0]), torch.tensor([1]), (3, 4))  # 0.5 against 0.6
    matched = 0.5 * torch.tensor(0.5 / 0.6, dtype=torch.float64).log()
    unmatched = abs(0.3 - 0.2) + abs(0.2 - 0.1) + 0.1
    loss = hybrid_uld(student.log(), teacher.log(), pair, ReverseKL())
    close(loss, (0.25 * matched + 0.75 * unmatched)[None])


def test_nothing_shared_is_uld() -> None:
    student = random_logprobs(0, 4).requires_grad_()
    teacher = random_logprobs(1, 4, size=9)
    none = torch.tensor([], dtype=torch.long)
    nothing = Pairs.of(none, none, (VOCABULARY, 9))
    loss = hybrid_uld(student, teacher, nothing, JSD())
    close(loss.detach(), uld(student.exp(), teacher.exp()).detach())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_the_weight_of_pairs_counts_tokens_and_can_be_given() -> None:
    student, teacher = random_logprobs(0, 4), random_logprobs(1, 4, size=9)
    ids = torch.tensor([0, 2, 5])
    # Of a head of nine rows eight are tokens.
    pairs = Pairs.of(ids, ids, (VOCABULARY, 9), known=8)
    assert pairs.share == 3 / 8
    matched = JSD()(student[:, ids], teacher[:, ids])
    rest = uld(student[:, [1, 3, 4]].exp(), teacher[:, [1, 3, 4, 6, 7, 8]].exp())
    for weight in (None, 0.0, 0.25, 1.0):
        share = 3 / 8 if weight is None else weight
        found = HybridULD(JSD(), weight=weight)(student, teacher, pairs)
        close(found, share * matched + (1 - share) * rest)
    close(HybridULD(hybrid=False)(student, teacher, pairs), uld(student.exp(), teacher.exp()))
    close(HybridULD()(student, student.roll(1, 0)), JSD()(student, student.roll(1, 0)))


def test_every_token_knows_the_end_of_its_group() -> None:
    ends = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    assert group_ends(ends).tolist() == [[1, 1, 2, 5, 5], [0, 4, 4, 4, 4]]
    assert group_ends(ends[:, :0]).shape == (2, 0)


# Groups as actions -----------------------------------------------------------------------


def regrouped(student: Tensor, other: Tensor, ends: list[list[int]]) -> Tensor:
    return in_groups(student, other, torch.tensor(ends).bool())


def test_every_token_carries_its_groups_difference() -> None:
    student = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, -1.5, -3.5, -1.0, -6.0, 0.0]], dtype=torch.float64)
    # Groups of 2, 1 and 1; the fifth token has no group, and the sixth is padding.
    found = regrouped(student, other, [[0, 1, 1, 1, 0, 0]])
    close(found - student, torch.tensor([[1.5, 1.5, -0.5, 3.0, 0.0, 0.0]], dtype=torch.float64))


def test_groups_of_one_change_nothing_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    student, other = (-10 * torch.rand(4, 50, generator=generator) for _ in range(2))
    assert torch.equal(in_groups(student, other, torch.ones(4, 50, dtype=torch.bool)), other)


def test_only_a_groups_sum_is_read_and_the_sums_are_the_sequences() -> None:
    student, other = random_logprobs(0, 3), random_logprobs(1, 3)
    ends = [[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]]
    at_end = torch.zeros_like(other)
    for row, marks in enumerate(ends):
        for column in range(VOCABULARY):
            at_end[row, column + marks[column:].index(1)] += other[row, column]
    found = regrouped(student, other, ends)
    close(regrouped(student, at_end, ends), found)
    close(((found - student) * torch.tensor(ends)).sum(1), (other - student).sum(1))


def test_one_text_distribution_in_two_tokenizations_gives_no_signal() -> None:
    """The student writes the letters of every text; the teacher's tokens are pairs of them."""
    student = token_logprobs(random_logits(0))
    pairs = torch.zeros_like(student)
    pairs[:, -1] = student.sum(1)
    ends = torch.zeros_like(student, dtype=torch.bool)
    ends[:, -1] = True
    close(in_groups(student, pairs, ends), student)
    assert (pairs - student).abs().min() > 1e-3  # token by token they seem to differ


def test_a_group_is_one_action_and_shares_of_it_would_be_biased() -> None:
    """All of a sequence in one group: the gradient of the KL between sequence distributions."""
    student, teacher = random_logits(0), random_logits(1)
    whole = torch.tensor([[0] * (LENGTH - 1) + [1]]).expand(len(SEQUENCES), -1).bool()
    theirs = token_logprobs(teacher)

    def losses(ours: Tensor) -> Tensor:
        told = in_groups(ours.detach(), theirs, whole)
        return policy_gradient(ours, told - ours.detach())

    def divergence(logits: Tensor) -> Tensor:
        logprobs = token_logprobs(logits).sum(1)
        return (logprobs.exp() * (logprobs - theirs.sum(1))).sum()

    exact = finite_difference(divergence, student)
    close(expected_gradient(student, losses), exact, atol=1e-7)

    def shares(ours: Tensor) -> Tensor:
        share = (theirs - ours.detach()).sum(1, keepdim=True) / LENGTH
        return policy_gradient(ours, share.expand_as(ours))

    assert (expected_gradient(student, shares) - exact).abs().max() > 1e-2


def test_extrapolation_reads_the_groups_of_all_three() -> None:
    student, teacher, reference = (random_logprobs(seed, 2) for seed in range(3))
    ends = [[0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1]]
    told = [regrouped(student, x, ends) for x in (teacher, reference)]
    found = extrapolated(told[0], student, told[1], 1.25)
    by_token = (teacher - student) + 0.25 * (teacher - reference)
    expected = regrouped(torch.zeros_like(student), by_token, ends)
    close(found, expected)
