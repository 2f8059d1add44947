"""Two tokenizations of one text: groups, merged distributions and losses, float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.alignment import Group, align, hybrid_uld, merge, shared_tokens, uld
from opd_lightning.losses.divergence import JSD, ReverseKL

VOCABULARY = 6
TEXT = "naïve 雪! 42 🙂".encode()


def random_logprobs(seed: int, rows: int, size: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).log_softmax(-1)


def cut(text: bytes, at: list[int]) -> list[bytes]:
    return [text[start:end] for start, end in pairwise([0, *at, len(text)])]


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_groups_by_hand() -> None:
    ours, theirs = [b"ab", b"c", b"def", b"g"], [b"a", b"bc", b"d", b"ef", b"g"]
    assert align(ours, theirs) == [
        Group(range(0, 2), range(0, 2)),
        Group(range(2, 3), range(2, 4)),
        Group(range(3, 4), range(4, 5)),
    ]
    assert align([], []) == []


def test_u22_a_character_may_be_split_between_tokens() -> None:
    """The two bytes of an i with diaeresis: one side cuts between them, the other does not."""
    ours, theirs = [b"na", b"\xc3", b"\xafve"], [b"na\xc3\xaf", b"ve"]
    assert b"".join(ours).decode() == "naïve"
    assert align(ours, theirs) == [Group(range(0, 3), range(0, 2))]
    assert align(ours, [b"na\xc3", b"\xaf", b"ve"]) == [
        Group(range(0, 2), range(0, 1)),
        Group(range(2, 3), range(1, 3)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_u22_groups_rebuild_the_text_and_are_the_shortest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cuts = [
        (1 + torch.nonzero(torch.rand(len(TEXT) - 1, generator=generator) < 0.5))[:, 0].tolist()
        for _ in range(2)
    ]
    ours, theirs = (cut(TEXT, at) for at in cuts)
    groups = align(ours, theirs)
    spelt = [b"".join(ours[i] for i in group.student) for group in groups]
    assert spelt == [b"".join(theirs[i] for i in group.teacher) for group in groups]
    assert b"".join(spelt) == TEXT
    assert len(groups) == 1 + len(set(cuts[0]) & set(cuts[1]))
    assert [i for group in groups for i in group.student] == list(range(len(ours)))
    assert [i for group in groups for i in group.teacher] == list(range(len(theirs)))


def test_u22_the_same_tokenizer_gives_the_jsd() -> None:
    tokens = cut(TEXT, [1, 4, 7, 10])
    groups = align(tokens, tokens)
    assert [(len(group.student), len(group.teacher)) for group in groups] == [(1, 1)] * 5
    ids = torch.arange(5)
    student = random_logprobs(0, 5).requires_grad_()
    teacher = random_logprobs(1, 5)
    ours = merge(student, ids, [group.student for group in groups])
    theirs = merge(teacher, ids, [group.teacher for group in groups])
    vocabulary = {f"token {i}": i for i in range(VOCABULARY)}
    loss = hybrid_uld(ours, theirs, shared_tokens(vocabulary, vocabulary), JSD(0.5))
    expected = JSD(0.5)(student, teacher)
    close(loss.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    close(gradient, torch.autograd.grad(expected.sum(), student)[0])
    assert (expected > 0.01).all()


def test_merge_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]], dtype=torch.float64)
    ids, groups = torch.tensor([1, 2, 0]), [range(0, 2), range(2, 3)]
    # The last position's row times P(first token) = 0.3.
    bayesian = merge(probs.log(), ids, groups, "bayesian").exp()
    close(bayesian, torch.tensor([[0.03, 0.18, 0.09], [0.4, 0.4, 0.2]], dtype=torch.float64))
    # The first position's row times P(second token | first) = 0.3.
    observed = merge(probs.log(), ids, groups, "observed").exp()
    close(observed, torch.tensor([[0.15, 0.09, 0.06], [0.4, 0.4, 0.2]], dtype=torch.float64))


def test_bayesian_is_the_chain_rule_and_observed_is_so_for_the_response_alone() -> None:
    """A model of two tokens by its joint distribution; the response is (1, 2)."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    joint /= joint.sum()
    first = joint.sum(dim=1)
    logprobs = torch.stack([first, joint[1] / first[1]]).log()
    ids = torch.tensor([1, 2])
    close(merge(logprobs, ids, [range(2)], "bayesian").exp(), joint[1:2])
    observed = merge(logprobs, ids, [range(2)], "observed").exp()[0]
    close(observed[1], joint[1, 2])
    assert (observed - joint[:, 2])[[0, 2]].abs().min() > 1e-3


def test_merge_of_many_sizes_and_its_gradient() -> None:
    logprobs = random_logprobs(3, 6).requires_grad_()
    ids, groups = torch.tensor([5, 0, 2, 2, 1, 3]), [range(0, 3), range(3, 4), range(4, 6)]
    merged = merge(logprobs, ids, groups)
    close(
        merged.detach(),
        torch.stack(
            [
                logprobs[2] + logprobs[0, 5] + logprobs[1, 0],
                logprobs[3],
                logprobs[5] + logprobs[4, 1],
            ]
        ).detach(),
    )
    (gradient,) = torch.autograd.grad(merged[:, 0].sum(), logprobs)
    expected = torch.zeros_like(gradient)
    expected[[2, 0, 1, 3, 5, 4], [0, 5, 0, 0, 0, 1]] = 1
    assert torch.equal(gradient, expected)
    assert merge(logprobs[:0], ids[:0], []).shape == (0, VOCABULARY)


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
    pair = torch.tensor([0]), torch.tensor([0])
    moved = torch.tensor([0, *range(8, 0, -1)])
    loss = hybrid_uld(student, teacher, pair, JSD())
    close(hybrid_uld(student, teacher[:, moved], pair, JSD()), loss)


def test_shared_tokens_are_paired_by_string() -> None:
    ours, theirs = {"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 5}
    student_ids, teacher_ids = shared_tokens(ours, theirs)
    assert student_ids.tolist() == [2, 0]
    assert teacher_ids.tolist() == [0, 5]
    assert [ids.tolist() for ids in shared_tokens({"a": 0}, {"b": 0})] == [[], []]


def test_hybrid_by_hand() -> None:
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64)
    pair = torch.tensor([0]), torch.tensor([1])  # 0.5 against 0.6
    matched = 0.5 * torch.tensor(0.5 / 0.6, dtype=torch.float64).log()
    unmatched = abs(0.3 - 0.2) + abs(0.2 - 0.1) + 0.1
    loss = hybrid_uld(student.log(), teacher.log(), pair, ReverseKL())
    close(loss, (0.25 * matched + 0.75 * unmatched)[None])


def test_nothing_shared_is_uld() -> None:
    student = random_logprobs(0, 4).requires_grad_()
    teacher = random_logprobs(1, 4, size=9)
    loss = hybrid_uld(student, teacher, shared_tokens({"a": 0}, {"b": 0}), JSD())
    close(loss.detach(), uld(student.exp(), teacher.exp()).detach())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_another_text_is_refused() -> None:
    with pytest.raises(UserError, match="spell b'abc' and the teacher's b'abd'"):
        align([b"ab", b"c"], [b"a", b"bd"])
    with pytest.raises(UserError, match="a token has no bytes"):
        align([b"ab", b""], [b"ab"])
