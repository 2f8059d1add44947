"""Runs whose sampler is truncated: exact comparison with the engine, unchanged losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import OPD, SFT, DistillationModule, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rules import TruncatedImportance
from opd_lightning.teachers import FrozenTeacher
from tests.integration.test_fit import Recorder, fit

pytestmark = pytest.mark.usefixtures("in_lab")

NUCLEUS = Sampling(temperature=1.3, top_p=0.9, top_k=40, max_new_tokens=8)


def run(method: DistillationModule, **data: Any) -> Recorder:
    return fit(method, steps=2, sampling=NUCLEUS, **data)


def common(**more: Any) -> dict[str, Any]:
    return {
        "student": Student("lab/arithmetic/student"),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "max_logprob_gap": 1e-4,  # of truncated and whole log-probs it is 0.1 and more
        **more,
    }


def test_a_divergence_on_truncated_samples_is_compared_exactly() -> None:
    top_k = TopK(k=8, support="teacher", normalise="renormalise")
    teacher = FrozenTeacher("lab/arithmetic/teacher")
    logged = run(DivergenceOPD(teacher=teacher, divergence=top_k, **common())).logged
    for step in logged:
        assert step["engine/logprob_gap_max"] < 1e-4
        assert step["engine/importance_ess"] == pytest.approx(1, abs=1e-4)
        assert 0.5 < step["engine/kept_mass"] < 0.999


def test_an_accepted_bias_reads_the_truncated_sampler() -> None:
    """Importance weights pi / mu are the kept mass of each token."""
    method = OPD(
        teacher=FrozenTeacher("lab/arithmetic/teacher"),
        rules=[TruncatedImportance()],
        **common(),
    )
    for step in run(method, accept_truncation_bias=True).logged:
        assert step["engine/logprob_gap_max"] < 1e-4
        weight = step["rule/importance/weight"]
        assert weight == pytest.approx(step["engine/kept_mass"], abs=1e-4)
        assert weight < 0.999


def test_a_greedy_teacher_writes_the_demonstrations(tmp_path: Path) -> None:
    sampler = TeacherSampler(
        path="lab/arithmetic/teacher",
        engine=HFEngine(),
        sampling=Sampling(temperature=0, max_new_tokens=6),
    )
    logged = run(SFT(**common()), mix=RolloutMix(teacher=1), teacher=sampler).logged
    assert all(0 < step["demonstration/length"] <= 6 for step in logged)
    assert "engine/kept_mass" not in logged[0]
