"""Prompts and responses must fit the models that read both, and no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.errors import UserError
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.teachers import ByDomainTeacher, FrozenTeacher
from tests.refusals import STUDENT, TEACHER, Refusal, opd

ACCEPTED = "the set-up is over"


@pytest.fixture
def begun(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Begin a run on one prompt of 20 tokens; return its refusal, or `ACCEPTED`."""

    def loads(*_: Any) -> None:
        raise UserError(ACCEPTED)

    def run(*args: Any, **data: Any) -> str:
        row = {"messages": "1" * 17, "answer": "2", "response": "12", "domain": "long"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"privileged": "1" * 18}) + "\n")
        monkeypatch.setattr("opd_lightning.models.student.Student.load", loads)
        return refusal(*args, path=str(tmp_path / "rows.jsonl"), **data)

    return run


def of_context(folder: str, tokens: int, new: Path) -> str:
    """Copy a model with another context length."""
    shutil.copytree(folder, new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return str(new)


def test_a_demonstrator_reads_its_own_responses_alone(begun: Refusal, tmp_path: Path) -> None:
    short = of_context(TEACHER, 50, tmp_path / "short")

    def run(budget: int, own: int, **mix: Any) -> str:
        return begun(
            lambda: opd(imitation=1.0),
            teacher=TeacherSampler(path=short, engine=HFEngine(), max_new_tokens=budget),
            mix=RolloutMix(**mix),
            sampling=Sampling(max_new_tokens=own),
        )

    assert run(30, 90, teacher=0.5) == ACCEPTED
    line = run(31, 90, teacher=0.5)
    assert (
        "prompt of 20 tokens + max_new_tokens 31 exceeds the data.teacher's context of 50" in line
    )
    assert line.endswith("or lower data.teacher's max_new_tokens")


def test_nobody_reads_responses_that_the_student_does_not_write(begun: Refusal) -> None:
    sampler = TeacherSampler(path=TEACHER, engine=HFEngine(), max_new_tokens=30)
    given: dict[str, Any] = {"teacher": sampler, "sampling": Sampling(max_new_tokens=1000)}
    built = {"build": lambda: opd(imitation=1.0)}
    assert begun(**built, mix=RolloutMix(teacher=1.0), **given) == ACCEPTED
    assert "max_new_tokens 1000 exceeds" in begun(**built, mix=RolloutMix(teacher=0.5), **given)


def test_the_student_reads_all_responses(begun: Refusal, tmp_path: Path) -> None:
    short = of_context(STUDENT, 50, tmp_path / "short")
    line = begun(
        lambda: opd(short, imitation=1.0),
        teacher=TeacherSampler(path=TEACHER, engine=HFEngine(), max_new_tokens=31),
        mix=RolloutMix(teacher=0.5),
        sampling=Sampling(max_new_tokens=8),
    )
    assert "max_new_tokens 31 exceeds the student's context of 50" in line


def test_a_domains_teacher_reads_its_domain_alone(begun: Refusal, tmp_path: Path) -> None:
    short = FrozenTeacher(of_context(TEACHER, 50, tmp_path / "short"))
    for domains, accepted in (({"short": short}, True), ({"long": short}, False)):
        teachers = {"long": FrozenTeacher(TEACHER), **domains}
        line = begun(
            lambda teachers=teachers: opd(teacher=ByDomainTeacher(teachers)),
            sampling=Sampling(max_new_tokens=40),
        )
        assert (line == ACCEPTED) is accepted
        assert accepted or "max_new_tokens 40 exceeds the teacher's context of 50" in line
