"""Truncated sampling: the mass it keeps, who may use it, and the sampling of demonstrations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from opd_lightning.data.mix import RolloutMix, TeacherSampler, samplings_by_author
from opd_lightning.errors import UserError
from opd_lightning.losses.top_k import TopK
from opd_lightning.losses.truncation import KeptMass
from opd_lightning.methods import AOPD, GRPO, OPD, DistillationModule, DistiLLM2, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rules import EntropyBonus, TruncatedImportance, TrustRegion
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.types import Author
from tests.refusals import Build, Refusal, divergence, opd, refusal  # noqa: F401 - a fixture

NUCLEUS = Sampling(top_p=0.9, max_new_tokens=12)


def warped(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return log-probs of the distribution after transformers' own truncation."""
    ids: Any = None
    scores = logprobs
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.log_softmax(-1)


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.9, 0), (0.5, 0), (0.01, 0), (1.0, 5), (0.8, 5), (0.9, 99), (1.0, 0)]
)
def test_kept_mass_is_that_of_the_sampler(top_p: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    drawn = warped(logprobs, top_p, top_k)
    kept = drawn.isfinite()
    mass = KeptMass(top_p, top_k)(logprobs)
    expected = torch.where(kept, logprobs - mass[:, None], -torch.inf)
    torch.testing.assert_close(drawn, expected, atol=1e-12, rtol=0)
    assert kept.all() == (top_p == 1 and top_k == 0)


def test_kept_mass_of_a_hand_made_row() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert KeptMass(top_p=0.7)(logprobs).exp().item() == pytest.approx(0.8)
    assert KeptMass(top_k=3)(logprobs).exp().item() == pytest.approx(0.95)
    # Of the top three the first has a share of 0.526, with the second 0.842.
    assert KeptMass(top_p=0.8, top_k=3)(logprobs).exp().item() == pytest.approx(0.8)


def aopd() -> AOPD:
    return AOPD(Student("lab/arithmetic/student"), FrozenTeacher("lab/arithmetic/teacher"))


def k2() -> DivergenceOPD:
    return divergence(terms=[TrustRegion(FrozenTeacher("lab/arithmetic/student"))])


@pytest.mark.parametrize("build", [opd, aopd, k2], ids=lambda build: build.__name__)
def test_a_mean_over_samples_is_refused(refusal: Refusal, build: Build) -> None:  # noqa: F811
    line = refusal(build, sampling=NUCLEUS)
    assert line.startswith("data.sampling: got top_p 0.9, top_k 0")
    assert "accept_truncation_bias" in line


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (divergence, {"sampling": NUCLEUS}),  # reads the whole distribution
        (opd, {}),  # samples the whole distribution
    ],
    ids=["divergence", "whole"],
)
def test_a_bias_that_is_not_there_is_not_accepted(
    refusal: Refusal,  # noqa: F811
    build: Build,
    data: dict[str, Any],
) -> None:
    line = refusal(build, accept_truncation_bias=True, **data)
    assert line.startswith("data.accept_truncation_bias: got true")


def test_which_losses_average_samples() -> None:
    student, teacher = Student("nowhere"), FrozenTeacher("nowhere")
    top_k = TopK(k=4, support="teacher", normalise="renormalise")
    averaging: dict[bool, list[DistillationModule]] = {
        True: [
            OPD(student, teacher),
            GRPO(student),
            DivergenceOPD(student, teacher, rules=[TruncatedImportance()]),
            DistiLLM2(student, teacher, rules=[TruncatedImportance()]),
            DistiLLM2(student, teacher, terms=[TrustRegion(teacher)]),
        ],
        False: [
            DivergenceOPD(student, teacher, top_k),
            DivergenceOPD(student, teacher, terms=[EntropyBonus()]),
            DivergenceOPD(student, teacher, terms=[TrustRegion(teacher, estimator="full")]),
            DistiLLM2(student, teacher),
        ],
    }
    for expected, methods in averaging.items():
        assert [method.averages_samples for method in methods] == [expected] * len(methods)


def test_a_greedy_student_is_refused(refusal: Refusal) -> None:  # noqa: F811
    line = refusal(divergence, sampling=Sampling(temperature=0, max_new_tokens=12))
    assert line.startswith("data.sampling.temperature: got 0")


def sampler(**more: Any) -> TeacherSampler:
    return TeacherSampler(path="nowhere", engine=HFEngine(), **more)


def test_the_teacher_has_a_sampling_of_its_own() -> None:
    greedy = Sampling(temperature=0, max_new_tokens=7)
    own = Sampling(temperature=0.8, max_new_tokens=5)
    by_author = samplings_by_author(own, RolloutMix(teacher=0.5), sampler(sampling=greedy))
    assert (by_author[Author.TEACHER], by_author[Author.STUDENT]) == (greedy, own)
    longer = samplings_by_author(own, RolloutMix(teacher=0.5), sampler(max_new_tokens=9))
    assert longer[Author.TEACHER] == Sampling(temperature=0.8, max_new_tokens=9)
    with pytest.raises(UserError, match=r"data\.teacher\.max_new_tokens"):
        sampler(sampling=greedy, max_new_tokens=9)


def test_sampling_is_not_judged_before_a_method_is_known() -> None:
    RolloutDataModule(sampling=NUCLEUS)
