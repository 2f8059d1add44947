"""Every method trains, twice alike, and becomes another where its parameters say so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import EMATeacherUpdate, PhasedTeacherSampling
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import PromptView
from opd_lightning.lab.arithmetic import generate_mixture
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import (
    CRISP,
    EDGEOPD,
    GKD,
    GOPD,
    GRPO,
    OPD,
    OPSD,
    OPSDK1,
    RLSD,
    SDFT,
    SDPO,
    SFT,
    SGOPD,
    DistillationModule,
    DivergenceOPD,
)
from opd_lightning.rollouts import HFEngine
from opd_lightning.rules import (
    EntropyBonus,
    EntropyGatedForwardKL,
    HardClip,
    PhasedFloor,
    PrefixWindow,
    StabilityWeight,
    TrajectoryGate,
    TrustRegion,
    VocabularyBaseline,
)
from opd_lightning.student import Student
from opd_lightning.teachers import ByDomainTeacher, EMATeacher, FrozenTeacher
from opd_lightning.types import Prompt
from opd_lightning.verifiers import Verifier
from tests.integration.test_fit import Recorder, fit

pytestmark = pytest.mark.usefixtures("in_lab")


class CountsDigits(Verifier):
    """Random models are right sometimes: where their response holds an even number of digits."""

    def verify(self, prompts: Any, responses: Any) -> list[float]:
        return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in responses]


VIEWS = {
    "demonstration": PromptView(template="{{ question }} such as {{ response }}", place="user"),
    "feedback": PromptView(template="{{ question }} {{ peer }}", place="user"),
    "concise": PromptView(template="be brief"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    problems = generate_mixture(("add-2", "sub-2"), 16, seed=0, held_out=False)
    rows = (
        {
            "id": f"{i}",
            "messages": [{"role": "user", "content": problem.question}],
            "answer": problem.answer,
            "privileged": f"the answer is {problem.answer}",
            "response": problem.solution,
            "domain": problem.domain,
        }
        for i, problem in enumerate(problems)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def student(**more: Any) -> dict[str, Any]:
    return {
        "student": Student("lab/arithmetic/student"),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "max_logprob_gap": 1e-4,
        **more,
    }


def teacher() -> FrozenTeacher:
    return FrozenTeacher("lab/arithmetic/teacher")


def start() -> FrozenTeacher:
    return FrozenTeacher("lab/arithmetic/student")


def demonstrations(**mix: Any) -> dict[str, Any]:
    sampler = TeacherSampler(path="lab/arithmetic/teacher", engine=HFEngine())
    return {"mix": RolloutMix(**mix), "teacher": sampler}


Case = tuple[Callable[[], DistillationModule], Callable[[], dict[str, Any]]]

CASES: dict[str, Case] = {
    "OPD": (lambda: OPD(teacher=teacher(), **student()), dict),
    "OPD discounted": (lambda: OPD(teacher=teacher(), discount=0.9, **student()), dict),
    "OPD by domain": (
        lambda: OPD(teacher=ByDomainTeacher({"add-2": teacher(), "sub-2": start()}), **student()),
        dict,
    ),
    "OPD with rules and terms": (
        lambda: OPD(
            teacher=teacher(),
            rules=[VocabularyBaseline(), HardClip(), PrefixWindow(tokens=8)],
            terms=[TrustRegion(start()), EntropyBonus(), EntropyGatedForwardKL(top_k=4)],
            imitation=0.1,
            **student(),
        ),
        lambda: {"mix": RolloutMix(add_recorded=True)},
    ),
    "DivergenceOPD": (lambda: DivergenceOPD(teacher=teacher(), **student()), dict),
    "DivergenceOPD, RG-OPD": (
        lambda: DivergenceOPD(
            teacher=teacher(),
            divergence=TopK(k=5, support="student", normalise="tail"),
            rules=[TrajectoryGate()],
            aggregation="mask-mean",
            **student(),
        ),
        dict,
    ),
    "OPD, REOPOLD": (
        lambda: OPD(
            teacher=teacher(),
            rules=[PhasedFloor(switch_step=1)],
            aggregation="mask-mean",
            **student(),
        ),
        dict,
    ),
    "GOPD": (lambda: GOPD(teacher=teacher(), reference=start(), **student()), dict),
    "SGOPD": (
        lambda: SGOPD(teacher=teacher(), reference=start(), stability=1.0, **student()),
        lambda: demonstrations(teacher=0.25, only_correct=True),
    ),
    "EDGEOPD": (
        lambda: EDGEOPD(teacher=start(), **student()),
        lambda: {"mix": RolloutMix(guided=0.5)},
    ),
    "EDGEOPD, soft": (lambda: EDGEOPD(teacher=start(), evidence="soft", **student()), dict),
    "OPSD": (lambda: OPSD(teacher=start(), **student()), dict),
    "OPSDK1": (lambda: OPSDK1(teacher=start(), **student()), dict),
    "RLSD": (lambda: RLSD(teacher=start(), **student()), dict),
    "SDFT": (lambda: SDFT(teacher=EMATeacher(rate=0.1), **student()), dict),
    "SDPO": (lambda: SDPO(teacher=EMATeacher(rate=0.05), **student()), dict),
    "CRISP": (lambda: CRISP(teacher=EMATeacher(rate=1.0, every=2), **student()), dict),
    "GKD": (
        lambda: GKD(teacher=teacher(), **student()),
        lambda: {"mix": RolloutMix(recorded=0.5, whole_steps=True)},
    ),
    "SFT": (lambda: SFT(**student()), lambda: {"mix": RolloutMix(recorded=1)}),
    "SFT, SeqKD": (lambda: SFT(**student()), lambda: demonstrations(teacher=1.0)),
    "GRPO": (lambda: GRPO(**student()), dict),
}


def run(case: Case, prompts: Path, **more: Any) -> Recorder:
    method, data = case[0](), case[1]()
    return fit(
        method,
        **{
            "train": PromptSource(str(prompts)),
            "verifier": CountsDigits(),
            "views": VIEWS,
            "callbacks": [EMATeacherUpdate()],
            **data,
            **more,
        },
    )


@pytest.mark.parametrize("name", CASES)
def test_trains_twice_alike_and_in_micro_batches(name: str, prompts: Path) -> None:
    first = run(CASES[name], prompts)
    again = run(CASES[name], prompts)
    losses = [logged["loss"] for logged in first.logged]
    assert losses == [logged["loss"] for logged in again.logged]
    assert all(torch.tensor(loss).isfinite() for loss in losses)
    largest = [max(g.abs().max() for g in step.values()) for step in first.gradients]
    assert max(largest) > 0
    split = run(CASES[name], prompts, micro_batches=3, steps=1)
    for parameter, gradient in first.gradients[0].items():
        torch.testing.assert_close(
            split.gradients[0][parameter], gradient, atol=1e-6, rtol=1e-5, msg=parameter
        )
