"""Teachers by domain: each row is scored by its own, with what all of them provide."""

from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.lab.models import new_model
from opd_lightning.losses.divergence import JSD, Divergence, ReverseKL
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import GKD, OPD, DivergenceOPD
from opd_lightning.models import head
from opd_lightning.models.student import Student
from opd_lightning.rules import TeacherEntropyMask
from opd_lightning.rules.base import Compare
from opd_lightning.teachers import (
    Ask,
    ByDomainTeacher,
    CrossTokenizerTeacher,
    FrozenTeacher,
    Teacher,
)
from opd_lightning.teachers.base import Provides
from opd_lightning.timing import StepTimer
from opd_lightning.training.scoring import LOSS, BatchScores, score_batch
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout

CPU = torch.device("cpu")
DOMAINS = ["math", "code", "math", "prose", "code"]


class TopOnly(FrozenTeacher):
    provides = Provides.TOP_K


class SampledOnly(FrozenTeacher):
    provides = Provides.SAMPLED_TOKENS
    provides_entropy = False


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = [tmp_path_factory.mktemp("model") for _ in range(4)]
    for seed, path in enumerate(paths):
        new_model(path, layers=1, hidden_size=32, seed=seed)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def student(folders: list[str]) -> Student:
    student = Student(folders[3])
    student.load()
    return student


def batch() -> RolloutBatch:
    responses = ([7, 8, 1], [11, 1], [13, 14, 15, 9, 1], [1], [20, 21, 22, 1])
    return make_batch(
        [
            make_rollout(list(ids), prompt_ids=[9, 10, i][: 1 + i % 3], domain=domain)
            for i, (ids, domain) in enumerate(zip(responses, DOMAINS, strict=True))
        ]
    )


def score(student: Student, teacher: Teacher, rows: RolloutBatch, by: Divergence) -> BatchScores:
    return score_batch(
        student,
        rows,
        asks={"teacher": Ask(teacher, "student")},
        comparisons={LOSS: Compare("teacher", by)},
        known={},
        top_k=3,
        timer=StepTimer(),
        sums_loss=True,
    )


def gradient(student: Student, loss: torch.Tensor) -> torch.Tensor:
    student.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


TOP = [
    TopK(k=4, support="teacher", normalise="tail"),
    TopK(k=4, support="intersection", normalise="none", gradient="corrected"),
    TopK(k=4, support="student", normalise="renormalise"),
]


MIXED = (TopOnly, FrozenTeacher, FrozenTeacher)
KINDS = [
    *(((FrozenTeacher,) * 3, one) for one in (ReverseKL(), JSD(0.5), *TOP)),
    *(((TopOnly,) * 3, one) for one in TOP),
    *((MIXED, one) for one in TOP),
]


@pytest.mark.parametrize(
    ("kinds", "divergence", "nested"),
    [
        *(pytest.param(*kinds, False) for kinds in KINDS),
        *(
            pytest.param(*kinds, True, marks=[] if kinds[0] == MIXED else pytest.mark.slow)
            for kinds in KINDS
        ),
    ],
    ids=str,
)
def test_a_batch_of_domains_equals_the_runs_of_one_domain(
    folders: list[str],
    student: Student,
    kinds: tuple[type[FrozenTeacher], ...],
    divergence: Divergence,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, gradient and logged scores, over several chunks and blocks of the head."""
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", 5 * 64)
    monkeypatch.setattr(head, "MAX_BLOCK_ELEMENTS", 2 * 64)
    names = ("math", "code", "prose")
    parts: dict[str, Teacher] = {
        name: kind(path) for name, kind, path in zip(names, kinds, folders, strict=False)
    }
    for part in parts.values():
        part.load(CPU, student)
    both = ByDomainTeacher(parts)
    if nested:
        inner = ByDomainTeacher({name: parts[name] for name in names[:2]})
        both = ByDomainTeacher({"math": inner, "code": inner, "prose": parts["prose"]})
    assert both.provides == min(kind.provides for kind in kinds)
    whole = batch()
    mixed = score(student, both, whole, divergence)
    found = gradient(student, mixed.values[LOSS].sum())
    assert found.abs().max() > 1e-3
    expected = torch.zeros_like(found)
    for row, domain in enumerate(DOMAINS):
        alone = score(student, parts[domain], whole.select([row]), divergence)
        torch.testing.assert_close(
            mixed.values[LOSS][row], alone.values[LOSS][0], atol=1e-6, rtol=1e-6
        )
        ours, theirs = (scores.others["teacher"] for scores in (mixed, alone))
        torch.testing.assert_close(ours.logprobs[row], theirs.logprobs[0], atol=1e-6, rtol=1e-6)
        assert (ours.top_ids[row] == theirs.top_ids[0]).all()
        expected += gradient(student, alone.values[LOSS].sum())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_ranks_without_rows_of_a_domain_call_its_teacher_too(
    folders: list[str], student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sharded models need it; what they return for others is not used."""
    one, other = FrozenTeacher(folders[0]), FrozenTeacher(folders[1])
    inner = ByDomainTeacher({"code": other})
    both = ByDomainTeacher({"math": one, "code": inner})
    both.load(CPU, student)
    rows = batch().select([0, 2])
    whole, some_ids = score(student, both, rows, ReverseKL()), torch.arange(24).reshape(8, 3)
    top = both.score_top(rows, "student", top_k=2, ids=some_ids)[1]
    calls: list[int] = []
    read = FrozenTeacher._read

    def counted(self: FrozenTeacher, *args: Any) -> Any:
        calls.append(id(self))
        return read(self, *args)

    monkeypatch.setattr(FrozenTeacher, "_read", counted)
    monkeypatch.setattr(FrozenTeacher, "is_collective", True)
    again = score(student, both, rows, ReverseKL())
    assert set(calls) == {id(one), id(other)}
    assert (again.values[LOSS] == whole.values[LOSS]).all()
    assert (
        both.score_top(rows, "student", top_k=2, ids=some_ids)[1].logprobs == top.logprobs
    ).all()


@pytest.mark.parametrize(
    ("kinds", "divergence", "allowed"),
    [
        ((FrozenTeacher, FrozenTeacher), ReverseKL(), True),
        ((FrozenTeacher, TopOnly), TOP[2], True),
        ((FrozenTeacher, TopOnly), ReverseKL(), False),
        ((FrozenTeacher, SampledOnly), TOP[0], False),
    ],
)
def test_what_one_of_them_does_not_provide_is_refused(
    folders: list[str], kinds: Any, divergence: Divergence, allowed: bool
) -> None:
    teachers = {str(i): kind(folders[i]) for i, kind in enumerate(kinds)}
    method = DivergenceOPD(Student(folders[3]), ByDomainTeacher(teachers), divergence)
    if allowed:
        method.check()
        return
    with pytest.raises(UserError, match=kinds[1].__name__):
        method.check()


def test_it_is_a_teacher_of_methods_in_this_process(folders: list[str]) -> None:
    teachers: dict[str, Teacher] = {"math": FrozenTeacher(folders[0])}
    GKD(Student(folders[3]), ByDomainTeacher(teachers)).check()


@pytest.mark.parametrize("by_domain", [False, True])
def test_an_entropy_that_is_not_known_is_refused(folders: list[str], by_domain: bool) -> None:
    silent: Teacher = CrossTokenizerTeacher(folders[0])
    teacher = ByDomainTeacher({"math": silent}) if by_domain else silent
    method = OPD(Student(folders[3]), teacher, rules=[TeacherEntropyMask(threshold=1.0)])
    with pytest.raises(UserError, match=r"TeacherEntropyMask .* CrossTokenizerTeacher"):
        method.check()
