"""Training runs under a teacher with other tokens."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from opd_lightning.lab.tokenizer import END_OF_TURN, VOCABULARY
from opd_lightning.methods import GOPD, OPD, DistillationModule
from opd_lightning.models.student import Student
from opd_lightning.rules import Rule, StabilityWeight, TrustRegion
from opd_lightning.teachers import CrossTokenizerTeacher, FrozenTeacher, Teacher
from tests.integration.test_fit import Recorder, fit
from tests.tokenizers import permute_vocabulary, write_model

pytestmark = pytest.mark.usefixtures("in_lab")


def opd(teacher: Teacher) -> DistillationModule:
    return OPD(
        Student("lab/arithmetic/student"),
        teacher,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        max_logprob_gap=1e-4,
    )


def assert_alike(one: Recorder, other: Recorder, bound: float) -> None:
    for ours, theirs in zip(one.gradients, other.gradients, strict=True):
        assert max(g.abs().max() for g in theirs.values()) > 1e-2
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=bound, rtol=0, msg=name)
    signals = [[x["signal/log_ratio_mean"] for x in run.logged] for run in (one, other)]
    assert signals[0] == pytest.approx(signals[1], abs=bound)


def test_the_same_tokenizer_is_the_same_run() -> None:
    frozen = fit(opd(FrozenTeacher("lab/arithmetic/teacher")))
    cross = fit(opd(CrossTokenizerTeacher("lab/arithmetic/teacher")))
    assert_alike(cross, frozen, 1e-6)
    assert cross.logged[0]["signal/group_length"] == 1
    assert "signal/group_length" not in frozen.logged[0]


def test_other_names_of_the_same_tokens_are_the_same_run(tmp_path: Path) -> None:
    permute_vocabulary(Path("lab/arithmetic/teacher"), tmp_path)
    frozen = fit(opd(FrozenTeacher("lab/arithmetic/teacher")))
    assert_alike(fit(opd(CrossTokenizerTeacher(str(tmp_path)))), frozen, 1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> CrossTokenizerTeacher:
    """A random model of the lab's characters and of all pairs of digits."""
    digits = "0123456789"
    merges = [(a, b) for a in digits for b in digits]
    tokens = [*VOCABULARY, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("pairs")
    write_model(folder, backend, END_OF_TURN, seed=0)
    return CrossTokenizerTeacher(str(folder))


def test_groups_of_tokens_go_through_every_part(pairs: CrossTokenizerTeacher) -> None:
    """A rule that sees the whole step first, a term and a reference with the student's tokens."""

    def method(*rules: Rule) -> DistillationModule:
        start = FrozenTeacher("lab/arithmetic/student")
        return GOPD(
            Student("lab/arithmetic/student"),
            teacher=pairs,
            reference=start,
            rules=[*rules],
            terms=[TrustRegion(start, coefficient=0.1)],
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
            max_logprob_gap=1e-4,
        )

    first_look = StabilityWeight(tau=math.inf)  # changes nothing, and requests all scores before
    plain, looked = fit(method()), fit(method(first_look))
    assert_alike(looked, plain, 1e-6)
    assert 1 < plain.logged[0]["signal/group_length"] < 3
    assert_alike(fit(method(first_look), micro_batches=2), plain, 1e-5)


def test_the_student_comes_nearer(pairs: CrossTokenizerTeacher) -> None:
    gaps = [x["signal/log_ratio_mean"] for x in fit(opd(pairs), steps=25).logged]
    assert sum(gaps[-5:]) / 5 > sum(gaps[:5]) / 5 + 0.5
