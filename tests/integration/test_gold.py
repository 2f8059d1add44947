"""GOLD trains with whole distributions of a teacher that has other tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from opd_lightning.commands.export import write_hf_folder
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab.problems import write_rows
from opd_lightning.lab.tokenizer import END_OF_TURN, VOCABULARY
from opd_lightning.methods import GKD, GOLD, SFT, DistillationModule
from opd_lightning.models.student import Student
from opd_lightning.rollouts import Sampling
from opd_lightning.rules import StabilityWeight, TrustRegion
from opd_lightning.teachers import CrossTokenizerTeacher, FrozenTeacher, Teacher
from opd_lightning.verifiers import RegexMatch
from tests.integration.test_fit import Recorder, fit
from tests.tokenizers import permute_vocabulary, write_model

pytestmark = pytest.mark.usefixtures("in_lab")
REPLY = "a;7"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of all pairs of digits and the lab's characters, most in another place."""
    digits = "0123456789"
    merges = [(a, b) for a in digits for b in digits]
    tokens = [*(a + b for a, b in merges), *VOCABULARY]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("pairs")
    write_model(folder, backend, END_OF_TURN, seed=0)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that all have the same reply."""
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    rows: list[dict[str, object]] = [
        {"id": f"{i}", "messages": [{"role": "user", "content": f"{i}="}], "response": REPLY}
        for i in range(16)
    ]
    write_rows(path, rows)
    return path


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def gold(teacher: Teacher, **more: Any) -> DistillationModule:
    student = Student("lab/arithmetic/student")
    return GOLD(student, teacher, **{"optimizer": adam, "max_logprob_gap": 1e-4, **more})


def gkd(**more: Any) -> DistillationModule:
    teacher = FrozenTeacher("lab/arithmetic/teacher")
    settings = {"optimizer": adam, "aggregation": "seq-mean-token-mean", **more}
    return GKD(Student("lab/arithmetic/student"), teacher, **settings)


def assert_alike(one: Recorder, other: Recorder, bound: float) -> None:
    for ours, theirs in zip(one.gradients, other.gradients, strict=True):
        assert max(g.abs().max() for g in theirs.values()) > 1e-3
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=1e-5)
    losses = [[x["loss"] for x in run.logged] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("beta", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_u22_the_same_tokens_are_gkd(beta: float) -> None:
    expected = fit(gkd(beta=beta), steps=2)
    for kind in (FrozenTeacher, CrossTokenizerTeacher):
        found = fit(gold(kind("lab/arithmetic/teacher"), beta=beta), steps=2)
        assert_alike(found, expected, 1e-6)
    assert found.logged[0]["signal/merged_groups"] == 0
    assert found.logged[0]["signal/shared_vocabulary"] == 1


def test_other_names_of_the_same_tokens_are_gkd(tmp_path: Path) -> None:
    permute_vocabulary(Path("lab/arithmetic/teacher"), tmp_path)
    found = fit(gold(CrossTokenizerTeacher(str(tmp_path))), steps=1)
    assert_alike(found, fit(gkd(), steps=1), 1e-5)


@pytest.mark.parametrize("adapts", [False, True])
def test_micro_batches_and_packed_rows_are_one_step(pairs: Path, adapts: bool) -> None:
    """Also with a rule that sees the whole step first, and a term with the student's tokens."""

    def run(packing: Any = "off", micro_batches: int = 1, **more: Any) -> Recorder:
        student = Student("lab/arithmetic/student", packing=packing)
        settings = {"optimizer": adam, "max_logprob_gap": 1e-4, **more}
        if adapts:
            start = FrozenTeacher("lab/arithmetic/student")
            settings["rules"] = [StabilityWeight(tau=0.5)]
            settings["terms"] = [TrustRegion(start, coefficient=0.1, estimator="full")]
        method = GOLD(student, CrossTokenizerTeacher(str(pairs)), **settings)
        return fit(method, steps=1, micro_batches=micro_batches)

    whole = run()
    figures = whole.logged[0]
    assert 0 < figures["signal/merged_groups"] < 0.5
    assert figures["signal/shared_vocabulary"] == pytest.approx(len(VOCABULARY) / 164)
    assert figures["rule/selected"] == pytest.approx(1 / figures["signal/group_length"])
    assert_alike(run(micro_batches=4), whole, 1e-6)
    if not adapts:
        assert_alike(run("on", 2), whole, 1e-6)
        mean = run(aggregation="mask-mean")  # over groups
        tokens = run(aggregation="token-mean")
        ratio = figures["signal/group_length"]
        assert mean.logged[0]["loss"] == pytest.approx(tokens.logged[0]["loss"] * ratio, rel=1e-4)


def test_a_student_learns_to_reply_as_its_teacher(pairs: Path, prompts: Path) -> None:
    """Forward KL: the JSD is nearly flat where the student never ends a reply."""
    data: dict[str, Any] = {
        "train": PromptSource(str(prompts)),
        "verifier": RegexMatch(rf"\A{REPLY}\Z"),
        "sampling": Sampling(max_new_tokens=8),
    }
    learner = SFT(Student(str(pairs)), optimizer=adam)
    fit(learner, steps=40, mix=RolloutMix(recorded=1), **data)
    write_hf_folder(learner.student, pairs / "trained")
    teacher = CrossTokenizerTeacher(str(pairs / "trained"))
    logged = fit(gold(teacher, beta=0.0), steps=45, **data).logged
    rewards, losses = [[x[name] for x in logged] for name in ("reward", "loss")]
    assert sum(rewards[:5]) == 0
    assert sum(rewards[-5:]) / 5 > 0.5
    assert sum(losses[-5:]) < sum(losses[:5]) / 4
    assert logged[0]["signal/merged_groups"] > 0
