"""Parts that a user wrote: wrong values end a run in one line."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import RunStoppedError
from opd_lightning.losses.divergence import Divergence
from opd_lightning.methods import OPD, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rules import PrefixWindow, Rule, Scored, Signal, Term
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.types import TokenScores
from tests.integration.test_fit import fit

pytestmark = pytest.mark.usefixtures("in_lab")


def method(cls: Any = OPD, **more: Any) -> Any:
    student, teacher = "lab/arithmetic/student", "lab/arithmetic/teacher"
    return cls(Student(student), FrozenTeacher(teacher), **more)


class Whole(Divergence):
    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum()


class MeanTerm(Term):
    name = "mean"

    def token_loss(self, student: TokenScores, scored: Scored, values: Any) -> Tensor:
        return student.logprobs.mean()


class Padded(Rule):
    def apply(self, signal: Signal, scored: Scored, observed: Tensor | None = None) -> Any:
        return Signal(
            advantage=signal.advantage, weight=signal.weight, mask=torch.ones_like(signal.mask)
        ), {}


class MeanLoss(OPD):
    def token_loss(self, student: TokenScores, *_: Any) -> Tensor:
        return student.logprobs.mean()


class Detached(OPD):
    def token_loss(self, student: TokenScores, *_: Any) -> Tensor:
        return student.logprobs.detach()


class RowAdvantage(OPD):
    def advantage(self, scored: Scored) -> Tensor:
        return scored.log_ratio.sum(1)


class NoScores(FrozenTeacher):
    def score(self, *args: Any, **more: Any) -> Any:
        return super().score(*args, **more).logprobs


def test_values_of_another_shape_end_the_run() -> None:
    teacher = NoScores("lab/arithmetic/teacher")
    wrong = {
        "Whole: got the shape [] for": method(DivergenceOPD, divergence=Whole()),
        "MeanTerm.token_loss: got a tensor": method(terms=[MeanTerm()]),
        "Padded.apply, mask: got tokens that are padding": method(
            rules=[PrefixWindow(2), Padded()]
        ),
        "MeanLoss.token_loss: got a tensor": method(MeanLoss),
        "Detached: its loss has no gradient": method(Detached),
        "RowAdvantage.advantage: got a tensor": method(RowAdvantage),
        "NoScores.score: got a tensor": OPD(Student("lab/arithmetic/student"), teacher),
    }
    for said, one in wrong.items():
        with pytest.raises(RunStoppedError) as caught:
            fit(one, steps=1)
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 400
