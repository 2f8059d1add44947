"""Loss terms with other views than the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import ForwardKL, ReverseKL
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.losses.schedule import Linear
from opd_lightning.models.student import Student
from opd_lightning.rules import (
    EntropyBonus,
    EntropyGatedForwardKL,
    Rule,
    Term,
    TrustRegion,
)
from opd_lightning.rules.base import Compare, Scored
from opd_lightning.teachers import Teacher
from opd_lightning.teachers.base import Ask
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.scoring import BatchScores
from opd_lightning.types import Author, RolloutBatch, TokenScores
from tests.batches import make_batch, make_rollout
from tests.toy import make_scored, score_of


class Unasked(Teacher):
    def load(self, device: Any, student: Any) -> None: ...
    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        raise AssertionError("the scores are given")


TEACHER, OTHER = Unasked(), Unasked()


class Hint(Term):
    """Reads `OTHER` under a view that some rows lack."""

    name = "hint"

    def asks(self) -> Mapping[str, Ask]:
        return {"hint": Ask(OTHER, "hint")}

    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        return 2 * student.logprobs


class ReadsHint(Rule):
    needs = ("hint",)

    def apply(self, signal: Any, scored: Any, observed: Any = None) -> Any:
        return signal, {}


class Given(ComposedMethod):
    """Method whose log-probs `[B, R]` are given; its teacher reads the view `teacher_view`."""

    def __init__(self, logprobs: Tensor, teacher_view: str = "student", **parts: Any) -> None:
        super().__init__(Student("nowhere"), **parts)
        self.logprobs = logprobs
        self.teacher_view = teacher_view

    def asks(self) -> Mapping[str, Ask]:
        return {"teacher": Ask(TEACHER, self.teacher_view)}

    def _score(self, batch: RolloutBatch, known: Any = None) -> BatchScores:
        student = replace(score_of(self.logprobs), logprobs=self.logprobs)
        others = {name: score_of(torch.zeros_like(self.logprobs)) for name in self.all_asks()}
        scored = Scored(batch=batch, student=student.detach(), others=others, values={})
        values = dict.fromkeys(self.all_comparisons(), self.logprobs)
        return BatchScores(scored, student, values, others)


def gradient(**more: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss's gradient by log-probs, where the second row lacks the view; logged rates."""
    rows = [
        make_rollout([5, 6], views={"hint": [8, 9]}, group=0),
        make_rollout([5, 6], views={"hint": None}, group=1),
    ]
    batch = make_batch(rows)
    logprobs = torch.full((2, 2), -1.0, requires_grad=True)
    method = Given(logprobs, **more)
    loss = method.loss(batch)
    (found,) = torch.autograd.grad(loss, logprobs)
    return found, {name: float(value) for name, value in method.rates.compute().items()}


def test_a_term_leaves_the_loss_of_the_method_alone() -> None:
    alone, rates = gradient()
    both, with_term = gradient(terms=[Hint()])
    assert (alone != 0).all()
    torch.testing.assert_close(both[1], alone[1])  # not in the term
    torch.testing.assert_close(both[0], alone[0] + 2 / 4)  # in both, of four tokens
    assert with_term.pop("term/hint") == -1.0  # mean of -2, -2 and two tokens that it does not read
    assert with_term == rates
    assert rates["rule/selected"] == 1.0


@pytest.mark.parametrize(
    "more", [{"teacher_view": "hint"}, {"terms": [Hint()], "rules": [ReadsHint()]}]
)
def test_a_row_without_what_the_signal_reads_has_no_signal(more: dict[str, Any]) -> None:
    found, rates = gradient(**more)
    assert (found[0] != 0).all()
    assert (found[1] == 0).all()
    assert rates["rule/selected"] == 0.5


def test_what_parts_read_is_known() -> None:
    assert Hint().names_read() == {"hint"}
    assert EntropyGatedForwardKL().names_read() == {"teacher"}
    assert ReadsHint().names_read() == {"hint"}

    class Compares(ReadsHint):
        def comparisons(self) -> Mapping[str, Compare]:
            return {"x": Compare("other", max), "y": Compare(None, min)}

    assert Compares().names_read() == {"hint", "other"}


def test_a_trust_region_has_a_view_and_a_direction() -> None:
    ours, theirs = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    for direction, kl in (("reverse", ReverseKL()), ("forward", ForwardKL())):
        term = TrustRegion(OTHER, estimator="full", view="hint", direction=direction)  # type: ignore[arg-type]
        assert term.asks() == {"trust_region": Ask(OTHER, "hint")}
        compare = term.comparisons()["trust_region"]
        assert torch.equal(compare.function(ours, theirs), kl(ours, theirs))
    with pytest.raises(UserError, match="direction"):
        TrustRegion(OTHER, estimator="k2", direction="forward")


def test_an_entropy_bonus_ignores_tokens_that_the_student_cannot_say() -> None:
    """Logits of -inf, as of padded vocabularies: 0 log 0 is 0, in the gradient too."""
    function = EntropyBonus().comparisons()["entropy_bonus"].function
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    padded = torch.cat([logits, torch.full((3, 1), -torch.inf)], dim=-1)
    (slope,) = torch.autograd.grad(function(padded.log_softmax(-1), None).sum(), logits)
    value = -torch.distributions.Categorical(logits=logits).entropy()
    (expected,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(function(padded.log_softmax(-1), None), value)
    torch.testing.assert_close(slope, expected)


def test_a_trust_region_spares_rollouts_by_their_score() -> None:
    """KDRL's variant penalises wrong rollouts only; the normaliser still counts all."""
    student, teacher = torch.full((3, 2), -1.0), torch.full((3, 2), -3.0)
    scored = make_scored(student, teacher, rewards=[0.5, 0.4, torch.nan])
    scored.others["kd"] = scored.teacher  # type: ignore[index]
    for rollouts, rows in (("all", [2, 2, 2]), ("wrong", [0, 2, 0]), ("correct", [2, 0, 0])):
        term = TrustRegion(TEACHER, 1.0, "k2", name="kd", rollouts=rollouts)  # type: ignore[arg-type]
        assert term.token_loss(scored.student, scored, {})[:, 0].tolist() == rows
        assert Given(student, terms=[term]).needs_rewards is (rollouts != "all")


def scored_by_hand(step: int = 0) -> Scored:
    """Log-ratios 1, -0.5 and 0, and entropies of which the teacher's and the student's differ."""
    student = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    ratio = torch.tensor([[1.0, -0.5, 0.0]], dtype=torch.float64)
    low, high = (torch.tensor([x], dtype=torch.float64) for x in ([0.5, 0.8, 0.9], [0.9, 0.9, 0.1]))
    scored = make_scored(student, student + ratio, entropy=high, step=step)
    teacher = replace(scored.teacher, entropy=low)
    return replace(scored, others={"teacher": teacher, "trust_region": teacher})


VALUES = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("term", "step", "expected"),
    [
        (EntropyGatedForwardKL(), 0, [0.0, 0.0, 4.0]),  # the teacher's entropy, above 0.8
        (EntropyGatedForwardKL(threshold=0.4), 0, [1.0, 2.0, 4.0]),
        (EntropyBonus(0.5), 0, [0.5, 1.0, 2.0]),  # the value is minus the entropy
        (TrustRegion(OTHER, 0.5, "full"), 0, [0.5, 1.0, 2.0]),
        (TrustRegion(OTHER, 0.5, "k2"), 0, [0.25, 0.0625, 0.0]),
        (TrustRegion(OTHER, 0.5, "k3"), 0, [(math.e - 2) / 2, (math.exp(-0.5) - 0.5) / 2, 0.0]),
        (TrustRegion(OTHER, Linear(start=1.0, end=0.0, steps=4), "k2"), 3, [0.125, 0.03125, 0.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_terms_by_hand(term: Term, step: int, expected: list[float]) -> None:
    scored = scored_by_hand(step)
    found = term.token_loss(scored.student, scored, {term.name: VALUES})
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


class Plain(Term):
    """Adds every token's log-prob."""

    name = "plain"

    def token_loss(
        self, student: TokenScores, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        return student.logprobs


@pytest.mark.parametrize(
    ("aggregation", "own", "given"),
    [
        ("token-mean", 2, [4, 4]),
        ("seq-mean-token-mean", 2, [6, 2]),
        ("seq-mean-token-sum", 1, [2, 2]),
    ],
)
def test_imitated_responses_have_a_loss_and_a_normaliser_of_their_own(
    aggregation: Aggregation, own: int, given: list[int]
) -> None:
    """The student's two tokens have d = 2; of others' responses one of 3 and one of 1 token."""
    rows = [
        make_rollout([5, 6]),
        make_rollout([5, 6, 7], author=Author.TEACHER),
        make_rollout([5], author=Author.RECORDED),
        make_rollout([5, 6, 7], author=Author.TEACHER, dropped=True),
    ]
    batch = make_batch(rows)
    batch = replace(batch, totals=replace(batch.totals, step=3))
    logprobs = torch.full((4, 3), -2.0, requires_grad=True)
    weight = Linear(start=1.0, end=0.0, steps=4)
    method = Given(logprobs, imitation=weight, aggregation=aggregation, terms=[Plain()])
    method.loss(batch).backward()
    # -d from the policy gradient and 1 from the term, which leaves out what is imitated.
    expected = torch.zeros(4, 3)
    expected[0, :2] = (-2 + 1) / own
    for row, (number, divisor) in enumerate(zip((3, 1), given, strict=True), 1):
        expected[row, :number] = -0.25 / divisor
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected)
