"""Comparisons of groups of tokens equal the merged formula, in value and gradient."""

from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from opd_lightning.losses.alignment import HybridULD, Pairs
from opd_lightning.losses.divergence import JSD, Divergence
from opd_lightning.models import head as head_module
from opd_lightning.models.groups import GroupComparison
from opd_lightning.models.head import Comparison, Head, HeadScores, MixedStates, TokenStates, score
from tests.merged import merge

H, OURS, THEIRS = 8, 11, 17
TEMPERATURE = 0.7
# Two responses of 7 and 4 tokens. The last two tokens of the first have no group.
STUDENT = [range(0, 1), range(1, 4), range(4, 5), range(7, 9), range(9, 11)]
TEACHER = [range(0, 2), range(2, 3), range(3, 4), range(4, 7), range(7, 8)]
N, N_T = 11, 8
PAIRS = Pairs.of(torch.tensor([0, 3, 7, 8]), torch.tensor([2, 5, 0, 16]), (OURS, THEIRS), known=15)


class Case(NamedTuple):
    student: TokenStates
    linear: nn.Linear
    ids: Tensor  # [N]
    teacher: TokenStates
    teacher_ids: Tensor  # [N_T]


def states(seed: int, rows: int, size: int) -> tuple[TokenStates, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(H, size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(size, H, generator=generator, dtype=torch.float64))
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64)
    head = Head(project=linear, vocab_size=size, temperature=TEMPERATURE, softcap=4.0)
    return TokenStates(hidden.requires_grad_(), head), linear


def case() -> Case:
    student, linear = states(0, N, OURS)
    teacher, _ = states(1, N_T, THEIRS)
    ids = torch.arange(N) * 5 % OURS
    return Case(student, linear, ids, teacher, torch.arange(N_T) * 3 % THEIRS)


def whole(of: TokenStates) -> Tensor:
    return of.head.finish(of.head.project(of.hidden)).log_softmax(-1)


def comparison(one: Case, function: Divergence) -> GroupComparison:
    """What a teacher returns for these groups."""
    ends, given = torch.full((N,), -1), torch.zeros(N, dtype=torch.float64)
    theirs = whole(one.teacher).detach().gather(1, one.teacher_ids[:, None])[:, 0]
    for ours, other in zip(STUDENT, TEACHER, strict=True):
        ends[list(ours)] = ours[-1]
        given[ours[-1]] = theirs[list(other)[:-1]].sum()
    rows = torch.tensor([group[-1] for group in STUDENT])
    last = one.teacher.hidden[[group[-1] for group in TEACHER]].detach()
    seen = MixedStates(((rows, TokenStates(last, one.teacher.head)),))

    def of_pairs(student: Tensor, teacher: Tensor) -> Tensor:
        return function(student, teacher, pairs=PAIRS)  # type: ignore[call-arg]

    return GroupComparison(seen, of_pairs, ends, given)


def chunked(one: Case, function: Divergence) -> HeadScores:
    group = comparison(one, function)
    parts = group.comparisons("loss", one.student, one.ids)
    return group.complete("loss", score(one.student, one.ids, comparisons=parts))


def direct(one: Case, function: Divergence) -> Tensor:
    """Return the values of the groups, `[G]`."""
    kept = [k for group in STUDENT for k in group]
    place = {k: i for i, k in enumerate(kept)}
    moved = [range(place[g[0]], place[g[-1]] + 1) for g in STUDENT]
    ours = merge(whole(one.student)[kept], one.ids[kept], moved)
    theirs = merge(whole(one.teacher).detach(), one.teacher_ids, TEACHER)
    return function(ours, theirs, pairs=PAIRS)  # type: ignore[call-arg]


FUNCTIONS = {
    "hybrid": HybridULD(),
    "forward": HybridULD(JSD(beta=0.0)),
    "reverse": HybridULD(JSD(beta=1.0), weight=0.8),
    "paired tokens alone": HybridULD(JSD(beta=0.2), weight=1.0),
    "ULD": HybridULD(hybrid=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 3, N])
@pytest.mark.parametrize("kind", ["linear", "with a bias"])
def test_value_and_gradient_are_those_of_the_merged_distributions(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int, kind: str
) -> None:
    """In chunks of any size, by either way through the head."""
    monkeypatch.setattr(head_module, "MAX_CHUNK_ELEMENTS", 2 * rows * THEIRS)
    monkeypatch.setattr(head_module, "MAX_BLOCK_ELEMENTS", rows * THEIRS)
    one = case()
    if kind == "with a bias":  # through autograd, as adapters
        generator = torch.Generator().manual_seed(2)
        bias = torch.randn(OURS, generator=generator, dtype=torch.float64)
        one.linear.bias = nn.Parameter(bias)
    ends = torch.tensor([group[-1] for group in STUDENT])
    expected = direct(one, FUNCTIONS[name])
    found = chunked(one, FUNCTIONS[name])
    assert found.values.keys() == {"loss"}
    assert not found.teachers
    values = found.values["loss"]
    torch.testing.assert_close(values[ends], expected)
    rest = torch.ones(N, dtype=torch.bool).index_fill(0, ends, False)
    assert (values[rest] == 0).all()
    # Beside another use of the log-probs, with a weight for every group.
    up = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
    parameters = [one.student.hidden, *one.linear.parameters()]
    chosen = whole(one.student).gather(1, one.ids[:, None])[:, 0]
    # The probability of a group's earlier tokens is a part of the gradient.
    (alone,) = torch.autograd.grad(expected[1], one.student.hidden, retain_graph=True)
    assert alone[1:3].abs().amax(dim=1).min() > 1e-5
    exact = torch.autograd.grad((up * expected).sum() + chosen.sum() / 7, parameters)
    loss = (up * values[ends]).sum() + found.student.logprobs.sum() / 7
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_of_a_head_under_an_adapter() -> None:
    one = case()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = one.linear

    torch.manual_seed(0)
    adapted = get_peft_model(Model(), LoraConfig(r=2, target_modules=["lm_head"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    layer = adapted.base_model.model.lm_head.double()
    head = Head(project=layer, vocab_size=OURS, temperature=TEMPERATURE)
    one = one._replace(student=TokenStates(one.student.hidden, head))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    exact = torch.autograd.grad(direct(one, HybridULD()).sum(), trained)
    found = torch.autograd.grad(chunked(one, HybridULD()).values["loss"].sum(), trained)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_a_gradient_the_values_are_the_same() -> None:
    one = case()
    with torch.no_grad():
        found = chunked(one, HybridULD()).values["loss"]
    torch.testing.assert_close(found, chunked(one, HybridULD()).values["loss"].detach())


def test_the_teachers_logits_are_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher with a larger vocabulary than the student's has no larger chunks."""
    monkeypatch.setattr(head_module, "MAX_CHUNK_ELEMENTS", 4 * THEIRS)
    one, sizes = case(), []
    project = one.teacher.head.project
    group = comparison(one, HybridULD())
    (rows, theirs), *_ = group.teacher.parts

    def counted(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return project(hidden)

    head = Head(project=counted, vocab_size=THEIRS, temperature=TEMPERATURE, softcap=4.0)
    seen = MixedStates(((rows, TokenStates(theirs.hidden, head)),))
    parts = group._replace(teacher=seen).comparisons("loss", one.student, one.ids)
    score(one.student, one.ids, comparisons=parts)
    assert sum(sizes) == len(STUDENT)  # nothing is computed at tokens that end no group
    assert max(sizes) <= 4


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    """With other groups than single tokens: all of a response is one."""
    student, linear = states(0, 3, OURS)
    ids = torch.tensor([1, 2, 3])
    logprobs = whole(student).detach().gather(1, ids[:, None])[:, 0]
    last = TokenStates(student.hidden[2:].detach(), student.head)
    same = torch.arange(OURS)

    def function(ours: Tensor, theirs: Tensor) -> Tensor:
        return HybridULD()(ours, theirs, pairs=Pairs.of(same, same, (OURS, OURS)))

    given = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) * logprobs[:2].sum()
    group = GroupComparison(
        MixedStates(((torch.tensor([2]), last),)), function, torch.full((3,), 2), given
    )
    parts = group.comparisons("loss", student, ids)
    values = group.complete("loss", score(student, ids, comparisons=parts)).values["loss"]
    assert values.abs().max() < 1e-12
    gradient = torch.autograd.grad(values.sum(), [student.hidden, linear.weight])
    assert max(g.abs().max() for g in gradient) < 1e-12


def test_groups_of_one_token_are_an_ordinary_comparison() -> None:
    student, _ = states(0, N, OURS)
    other, _ = states(1, N, OURS)
    teacher = TokenStates(other.hidden.detach(), other.head)
    ids, every = torch.arange(N) % OURS, torch.arange(N)
    same = Pairs.of(torch.arange(OURS), torch.arange(OURS), (OURS, OURS))

    def function(ours: Tensor, theirs: Tensor) -> Tensor:
        return HybridULD(JSD(beta=0.3))(ours, theirs, pairs=same)

    nothing = torch.zeros(N, dtype=torch.float64)
    group = GroupComparison(MixedStates(((every, teacher),)), function, every, nothing)
    parts = group.comparisons("loss", student, ids)
    assert list(parts) == ["loss"]  # no derivative is needed
    values = group.complete("loss", score(student, ids, comparisons=parts)).values["loss"]
    plain = score(student, ids, comparisons={"loss": Comparison(teacher, JSD(beta=0.3))})
    torch.testing.assert_close(values, plain.values["loss"])
    gradients = [
        torch.autograd.grad(x.sum(), student.hidden)[0] for x in (values, plain.values["loss"])
    ]
    torch.testing.assert_close(*gradients)
