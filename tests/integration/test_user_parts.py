"""Parts that a user wrote: states of rules are resumed, and wrong values end a run in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.losses.divergence import Divergence
from opd_lightning.methods import OPD, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rules import PrefixWindow, Rates, Rule, Scored, Signal, Term
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.types import TokenScores
from tests.integration.test_fit import fit

pytestmark = pytest.mark.usefixtures("in_lab")


class Running(Rule):
    """Counts steps, and holds a running mean of |d_t|."""

    step_wide: Any = True
    needs: Any = ("teacher",)

    def __init__(self, extra: Any = 0) -> None:
        self.extra = extra
        self.steps: list[int] = []
        self.mean = torch.zeros(())

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        return scored.log_ratio[signal.mask].abs()[:, None]

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        step = scored.batch.totals.step
        if step not in self.steps:
            assert observed is not None
            self.steps.append(step)
            self.mean = (self.mean + observed.mean()) / 2
        return signal, {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self.mean, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.mean = list(state["steps"]), state["mean"]


def method(cls: Any = OPD, **more: Any) -> Any:
    student, teacher = "lab/arithmetic/student", "lab/arithmetic/teacher"
    return cls(Student(student), FrozenTeacher(teacher), **more)


def test_a_rule_s_state_is_resumed(tmp_path: Path) -> None:
    def train(steps: int, rule: Rule, **more: Any) -> None:
        fit(method(rules=[rule]), steps=steps, micro_batches=2, **more)

    whole, first, second = Running(), Running(), Running()
    train(3, whole)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0)
    train(2, first, callbacks=[saver])
    train(3, second, ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.steps == whole.steps == [0, 1, 2]
    assert first.mean != second.mean == whole.mean


def test_a_state_that_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    rule = Running(extra=object())
    with pytest.raises(UserError, match=r"^rules: Running\.state_dict: .*return tensors"):
        fit(method(rules=[rule]), steps=1, callbacks=[ModelCheckpoint(tmp_path)])


def test_a_state_that_a_rule_cannot_restore_is_refused(tmp_path: Path) -> None:
    class Renamed(Running):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.steps = state["numbers"]

    Renamed.__name__ = "Running"
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    fit(method(rules=[Running()]), steps=1, micro_batches=2, callbacks=[saver])
    line = r"^Running\.load_state_dict: got .*; KeyError: 'numbers': let it read what Running"
    with pytest.raises(UserError, match=line):
        fit(method(rules=[Renamed()]), steps=2, ckpt_path=str(tmp_path / "last.ckpt"))


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
