"""Classes of a user that cannot work are refused in one line, before weights load."""

from typing import Any

import pytest

from opd_lightning.models.student import Student
from opd_lightning.rules import Rule, Term
from opd_lightning.run.part_checks import check_held_teachers
from opd_lightning.teachers import ByDomainTeacher, FrozenTeacher, Teacher
from opd_lightning.training.callback import RunCallback
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.verifiers import Verifier
from tests.refusals import STUDENT, TEACHER, Refusal, opd

# What is wrong is ignored by the type checker here, where a user may have none.
Part = Any


def method(**members: Any) -> Part:
    return type("Mine", (ComposedMethod,), members)(Student(STUDENT))


class Silent(Rule):
    step_wide: Part = True

    def apply(self, signal: Part, scored: Part, observed: Part = None) -> Part:
        return signal, {}


class Pair(Teacher):
    """Teacher that does not tell which ones it consists of."""

    def __init__(self) -> None:
        self.both = [FrozenTeacher(TEACHER), FrozenTeacher(STUDENT)]

    def load(self, device: Part, student: Part) -> None:
        pass

    def score(self, batch: Part, view: str, *, top_k: int = 0) -> Part:
        pass


class Open(Pair):
    def parts(self) -> list[Teacher]:
        return [part for teacher in self.both for part in teacher.parts()]


def test_what_a_method_asks_for_has_names(refusal: Refusal) -> None:
    line = refusal(lambda: method(asks=lambda self: {"teacher": FrozenTeacher(TEACHER)}))
    assert line.startswith("Mine.asks: expected a table of Ask by name")


def test_a_step_wide_rule_observes(refusal: Refusal) -> None:
    line = refusal(lambda: opd(rules=[Silent()]))
    assert line.startswith("rules: Silent is step_wide, but has no `observe`")


def test_a_term_has_a_name(refusal: Refusal) -> None:
    term: Part = type("Nameless", (Term,), {"token_loss": lambda *_: None})
    assert refusal(lambda: opd(terms=[term()])).startswith("terms: Nameless has no `name`")


@pytest.mark.parametrize(
    ("base", "name", "function", "said"),
    [
        (Rule, "apply", lambda self, signal: None, "apply(self, signal, scored, observed)"),
        (Term, "token_loss", lambda self, student: None, "token_loss(self, student, scored, value"),
        (FrozenTeacher, "score", lambda self, batch, view: None, "score(self, batch, view, top_k="),
        (Verifier, "verify", lambda self, responses: None, "verify(self, prompts, responses)"),
        (RunCallback, "before_step", lambda self, trainer: None, "before_step(self, trainer, step"),
    ],
)
def test_methods_take_their_arguments(
    base: Part, name: str, function: Part, said: str, refusal: Refusal
) -> None:
    made = type("Mine", (base,), {name: function, "name": "mine"})
    part = made(TEACHER) if base is FrozenTeacher else made()
    if base is Verifier:
        line = refusal(verifier=part)
    elif base is RunCallback:
        line = refusal(trainer={"callbacks": [part]})
    else:
        place = {Rule: "rules", Term: "terms", FrozenTeacher: "teacher"}[base]
        parts: dict[str, Any] = {place: part if place == "teacher" else [part]}
        line = refusal(lambda: opd(**parts))
    assert line.startswith(f"Mine.{name}: ")
    assert said in line


def test_optional_arguments_may_be_missing(refusal: Refusal) -> None:
    """The program leaves them out where they have their defaults."""
    rule: Part = type("Mine", (Rule,), {"apply": lambda self, signal, scored: (signal, {})})
    assert "nowhere.jsonl" in refusal(lambda: opd(rules=[rule()]), path="nowhere.jsonl")


def test_a_teacher_tells_the_teachers_that_it_has(refusal: Refusal) -> None:
    line = refusal(lambda: opd(teacher=Pair()))
    assert line.startswith("Pair.parts: got no FrozenTeacher, which it has as 'both'")
    nested = ByDomainTeacher({"default": Pair()})
    assert "Pair.parts" in refusal(lambda: opd(teacher=nested))
    assert "nowhere.jsonl" in refusal(lambda: opd(teacher=Open()), path="nowhere.jsonl")
    check_held_teachers(ByDomainTeacher({"a": Open()}))
