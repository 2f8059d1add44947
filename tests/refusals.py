"""Runs that are refused before weights load, built from objects: the parser takes a second."""

from collections.abc import Callable
from typing import Any

import pytest

from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import GOPD, GRPO, OPD, OPSDK1, DistillationModule, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.verifiers import ExactMatch

Build = Callable[[], DistillationModule]
Refusal = Callable[..., str]

STUDENT, TEACHER = "lab/arithmetic/student", "lab/arithmetic/teacher"
TRAIN = "lab/arithmetic/train.jsonl"


def opd(student: str = STUDENT, **more: Any) -> OPD:
    return OPD(Student(student), **{"teacher": FrozenTeacher(TEACHER), **more})


def divergence(**more: Any) -> DivergenceOPD:
    return DivergenceOPD(Student(STUDENT), **{"teacher": FrozenTeacher(TEACHER), **more})


def gopd(**more: Any) -> GOPD:
    return GOPD(Student(STUDENT), FrozenTeacher(TEACHER), **more)


def opsd(**more: Any) -> OPSDK1:
    return OPSDK1(Student(STUDENT), **{"teacher": FrozenTeacher(TEACHER), **more})


def grpo(**more: Any) -> GRPO:
    return GRPO(Student(STUDENT), **more)


def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no student and no teacher load weights."""

    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    for place in ("models.causal_lm", "models.student", "teachers.frozen"):
        monkeypatch.setattr(f"opd_lightning.{place}.load_causal_lm", no_weights)


@pytest.fixture
def refusal(in_lab: object, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Begin a run in the untrained lab; return the line that it is refused with."""
    forbid_weights(monkeypatch)

    def begin(
        build: Build = opd, path: str = TRAIN, trainer: dict[str, Any] | None = None, **data: Any
    ) -> str:
        """Of a method, a file of prompts, and settings of trainer and data."""
        settings: dict[str, Any] = {
            "engine": HFEngine(),
            "verifier": ExactMatch(ANSWER_PATTERN),
            "sampling": Sampling(max_new_tokens=12),
            "prompts_per_step": 4,
            **data,
        }
        with pytest.raises(UserError) as caught:
            Trainer(
                accelerator="cpu",
                max_steps=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **trainer or {},
            ).fit(build(), datamodule=RolloutDataModule(PromptSource(path), **settings))
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) <= 400
        return line

    return begin
