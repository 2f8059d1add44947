"""Scoring of a micro-batch: schedules, groups of several tokenizers, sizes of top-k sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.lab.models import new_model
from opd_lightning.losses.schedule import Linear
from opd_lightning.losses.target import GeometricTarget
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Compare
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.teachers.base import Ask
from opd_lightning.timing import StepTimer
from opd_lightning.training.scoring import BatchScores, asked_top_k, score_batch
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    new_model(path, layers=1, hidden_size=32, seed=0)
    return path


def loaded(path: Path) -> Student:
    student = Student(str(path))
    student.load()
    return student


def batch_of(step: int) -> RolloutBatch:
    batch = make_batch([make_rollout([7, 8, 9, 1], prompt_ids=[5])])
    return replace(batch, totals=replace(batch.totals, step=step))


def scores(student: Student, batch: RolloutBatch, **arguments: Any) -> BatchScores:
    given: dict[str, Any] = {"comparisons": {}, "known": {}, "top_k": 0, "timer": StepTimer()}
    return score_batch(student, batch, **{**given, **arguments})


def test_a_divergence_with_a_schedule_is_that_of_the_step(folder: Path, tmp_path: Path) -> None:
    new_model(tmp_path, layers=1, hidden_size=32, seed=1)
    student, teacher = loaded(folder), FrozenTeacher(str(tmp_path))
    teacher.load(torch.device("cpu"), student)
    veto = GeometricTarget(student=Linear(start=0.8, end=0.0, steps=4))

    def loss(divergence: GeometricTarget, step: int) -> float:
        compare: Mapping[str, Compare] = {"loss": Compare("teacher", divergence)}
        asks = {"teacher": Ask(teacher, "student")}
        values = scores(student, batch_of(step), asks=asks, comparisons=compare).values
        return values["loss"].sum().item()

    found = [loss(veto, step) for step in (0, 3)]
    assert found == [loss(GeometricTarget(student=student), 0) for student in (0.8, 0.2)]
    assert found[0] != found[1]


def test_two_foreign_tokenizers_are_compared_where_both_end_a_group(folder: Path) -> None:
    student, batch = loaded(folder), batch_of(0)
    own = student.score(batch).detach()
    ends = {"teacher": [0, 1, 1, 1], "reference": [1, 0, 1, 1]}
    logprobs = {"teacher": [0.0, -3.0, -1.0, -2.0], "reference": [-2.0, 0.0, -4.0, -0.5]}
    known = {
        name: replace(own, logprobs=torch.tensor([logprobs[name]]), ends=torch.tensor([at]).bool())
        for name, at in ends.items()
    }
    asks = {name: Ask(FrozenTeacher("nowhere"), "student") for name in known}
    found = scores(student, batch, asks=asks, known=known).scored.others
    for name, (first, last) in {"teacher": (-4.0, -2.0), "reference": (-6.0, -0.5)}.items():
        grouped = found[name]
        assert grouped.ends is not None
        assert grouped.ends.tolist() == [[False, False, True, True]]
        # A group of three tokens, each of which carries its whole difference, and one of one.
        difference = first - own.logprobs[0, :3].sum()
        expected = own.logprobs + difference
        expected[0, 3] = last
        torch.testing.assert_close(grouped.logprobs, expected)


def test_a_teacher_is_asked_for_what_is_compared_and_for_the_overlap() -> None:
    asks = {name: Ask(FrozenTeacher(name), "student") for name in ("teacher", "reference", "other")}

    def top(k: int) -> Compare:
        return Compare("reference", TopK(k, "teacher", "none"))

    for k, expected in ((4, 16), (16, 16), (64, 64)):
        found = asked_top_k(asks, {"x": top(k), "y": Compare(None, max)}, 16)
        assert found == {"teacher": 16, "reference": expected, "other": 0}
