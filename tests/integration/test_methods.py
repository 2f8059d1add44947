"""Every method trains reproducibly, and equals another method for certain parameters."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EMATeacherUpdate, PhasedTeacherSampling
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import PromptView
from opd_lightning.errors import UserError
from opd_lightning.lab.arithmetic import generate_mixture
from opd_lightning.losses.divergence import ForwardKL, TokenwiseKL
from opd_lightning.losses.schedule import Linear
from opd_lightning.losses.target import GeometricTarget
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
    DistilledRL,
    DivergenceOPD,
)
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rules import (
    CompetenceWeight,
    DriftGate,
    EntropyBonus,
    EntropyGatedForwardKL,
    EntropyWeight,
    HardClip,
    InDistributionWeight,
    LikelihoodMask,
    PhasedFloor,
    PrefixWindow,
    RewardWeight,
    TokenImportanceMask,
    TrajectoryGate,
    TrustRegion,
    VocabularyBaseline,
)
from opd_lightning.teachers import ByDomainTeacher, EMATeacher, FrozenTeacher
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
    "revision": PromptView(
        template="{{ attempt }}{{ reward }}{% if peer_failure %}{{ peer_failure }}{% endif %}",
        late_characters=4,
    ),
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


def demonstrations(of: Mapping[str, Any] | None = None, /, **mix: Any) -> dict[str, Any]:
    sampler = TeacherSampler(path="lab/arithmetic/teacher", engine=HFEngine(), **(of or {}))
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
    "SFT, weighed": (
        lambda: SFT(
            rules=[InDistributionWeight(), EntropyWeight(), LikelihoodMask(least=1e-3)],
            **student(),
        ),
        lambda: {"mix": RolloutMix(recorded=1)},
    ),
    "GRPO": (lambda: GRPO(**student()), dict),
    "DistilledRL": (lambda: DistilledRL(teacher=teacher(), **student()), dict),
    "OPSD, weighed": (
        lambda: OPSD(
            teacher=start(),
            view="revision",
            divergence=GeometricTarget(student=Linear(start=0.8, end=0.0, steps=2)),
            rules=[TokenImportanceMask(), RewardWeight(0.5), CompetenceWeight(), DriftGate(1.0)],
            aggregation="mask-mean",
            **student(),
        ),
        dict,
    ),
    "DivergenceOPD, BRTS": (
        lambda: DivergenceOPD(teacher=teacher(), divergence=TokenwiseKL(), **student()),
        lambda: demonstrations({"samples": 3, "keep": "best"}, teacher=0.5),
    ),
}


def run(case: Case, prompts: Path, **more: Any) -> Recorder:
    method, data = case[0](), case[1]()
    return fit(
        method,
        **{
            "train": PromptSource(str(prompts)),
            "verifier": CountsDigits(),
            "views": {name: VIEWS[name] for name in method.views() & VIEWS.keys()},
            "callbacks": [EMATeacherUpdate()],
            "sampling": Sampling(max_new_tokens=8),
            **data,
            **more,
        },
    )


def steps_of(name: str) -> int:
    return 3 if name == "CRISP" else 2  # its teacher moves with every second step


# Variants of methods that others of the cases train.
VARIANTS = (
    *("OPD discounted", "OPD by domain", "OPD, REOPOLD", "EDGEOPD, soft", "SFT, SeqKD"),
    *("SFT, weighed", "DivergenceOPD, RG-OPD"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ()) for n in CASES],
)
def test_trains_and_in_micro_batches_alike(name: str, prompts: Path) -> None:
    whole = run(CASES[name], prompts, steps=steps_of(name))
    assert all(torch.tensor(logged["loss"]).isfinite() for logged in whole.logged)
    largest = [max(g.abs().max() for g in step.values()) for step in whole.gradients]
    assert max(largest) > 0
    split = run(CASES[name], prompts, micro_batches=3, steps=1)
    for parameter, gradient in whole.gradients[0].items():
        torch.testing.assert_close(
            split.gradients[0][parameter], gradient, atol=1e-6, rtol=1e-5, msg=parameter
        )


# Together they have all that a run may draw at random, and all that it may keep from step to step.
QUICK = ("OPD with rules and terms", "SGOPD", "SDPO")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES],
)
def test_trains_twice_alike(name: str, prompts: Path) -> None:
    first, again = (run(CASES[name], prompts, steps=steps_of(name)) for _ in range(2))
    losses = [logged["loss"] for logged in first.logged]
    assert losses == [logged["loss"] for logged in again.logged]


def first_gradient(
    method: DistillationModule, prompts: Path, **data: Any
) -> dict[str, torch.Tensor]:
    return run((lambda: method, lambda: data), prompts, steps=1).gradients[0]


@cache
def simple_gradient(name: str, prompts: Path) -> dict[str, torch.Tensor]:
    return first_gradient(SIMPLE[name](), prompts)


V = 64  # the lab's vocabulary

# What the methods below become.
SIMPLE: dict[str, Callable[[], Any]] = {
    "OPD": lambda: OPD(teacher=teacher(), **student()),
    "OPSDK1": lambda: OPSDK1(teacher=start(), **student()),
    "GRPO": lambda: GRPO(**student()),
    "reverse KL": lambda: DivergenceOPD(teacher=teacher(), **student()),
    "forward KL": lambda: DivergenceOPD(teacher=teacher(), divergence=ForwardKL(), **student()),
    "GKD": lambda: GKD(teacher=teacher(), beta=0.0, **student()),
}

# Methods that are a simpler one at these parameters.
REDUCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "GOPD at scale 1 is OPD": (
        lambda: GOPD(teacher=teacher(), scale=1.0, **student()),
        "OPD",
    ),
    "GOPD whose reference is its teacher is OPD": (
        lambda: GOPD(teacher=teacher(), reference=teacher(), scale=1.8, **student()),
        "OPD",
    ),
    "SGOPD(1, 1) is OPD": (
        lambda: SGOPD(teacher=teacher(), scale=1.0, beta=1.0, **student()),
        "OPD",
    ),
    "EDGEOPD without evidence and anchor is OPSDK1": (
        lambda: EDGEOPD(teacher=start(), evidence="none", anchor=0, **student()),
        "OPSDK1",
    ),
    "EDGEOPD that keeps everything is OPSDK1": (
        lambda: EDGEOPD(teacher=start(), threshold=-float("inf"), anchor=0, **student()),
        "OPSDK1",
    ),
    "soft EDGEOPD at epsilon 0 is OPSDK1": (
        lambda: EDGEOPD(teacher=start(), evidence="soft", epsilon=0.0, anchor=0, **student()),
        "OPSDK1",
    ),
    "RLSD at epsilon 0 is GRPO": (
        lambda: RLSD(teacher=start(), epsilon=0.0, **student()),
        "GRPO",
    ),
    "RLSD at mix 0 is GRPO": (
        lambda: RLSD(teacher=start(), mix=0.0, **student()),
        "GRPO",
    ),
    "GKD at beta 1 is the reverse KL": (
        lambda: GKD(teacher=teacher(), beta=1.0, **student()),
        "reverse KL",
    ),
    "GKD at beta 0 is the forward KL": (
        lambda: GKD(teacher=teacher(), beta=0.0, **student()),
        "forward KL",
    ),
    "the top-k of everything is the reverse KL": (
        lambda: DivergenceOPD(
            teacher=teacher(),
            divergence=TopK(k=V, support="teacher", normalise="none", gradient="corrected"),
            **student(),
        ),
        "reverse KL",
    ),
    "SDFT on the student's own prompt is GKD": (
        lambda: SDFT(
            teacher=teacher(), view="student", skip=0, aggregation="token-mean", **student()
        ),
        "GKD",
    ),
}


# Further reductions of a method that has one beside them.
ALSO = (
    "GOPD whose reference is its teacher is OPD",
    "EDGEOPD that keeps everything is OPSDK1",
    "soft EDGEOPD at epsilon 0 is OPSDK1",
    "RLSD at mix 0 is GRPO",
    "GKD at beta 0 is the forward KL",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALSO else ()) for n in REDUCTIONS]
)
def test_reduces(name: str, prompts: Path) -> None:
    method, simple = REDUCTIONS[name]
    one, other = first_gradient(method(), prompts), simple_gradient(simple, prompts)
    assert max(g.abs().max() for g in other.values()) > 1e-4
    for parameter, gradient in other.items():
        torch.testing.assert_close(one[parameter], gradient, atol=1e-7, rtol=1e-5, msg=parameter)


@pytest.mark.parametrize("method", [OPSD, OPSDK1, EDGEOPD, CRISP])
def test_a_privileged_prompt_that_adds_nothing_teaches_nothing(method: Any, prompts: Path) -> None:
    views = {"concise" if method is CRISP else "privileged": PromptView(template="")}
    gradient = first_gradient(method(teacher=start(), **student()), prompts, views=views)
    assert max(g.abs().max() for g in gradient.values()) < 1e-6


def test_wrong_demonstrations_change_nothing(prompts: Path) -> None:
    """SG-OPD's T7: what the verifier refuses is as if it had not been written."""

    class Never(CountsDigits):
        def verify(self, prompts: Any, responses: Any) -> list[float]:
            return [0.0] * len(responses)

    def gradient(weight: float | None) -> dict[str, torch.Tensor]:
        method = SGOPD(teacher=teacher(), scale=1.0, imitation=weight, **student())
        data = demonstrations(teacher=0.5, only_correct=True)
        return first_gradient(method, prompts, verifier=Never(), **data)

    light, heavy = gradient(0.2), gradient(20.0)
    assert max(g.abs().max() for g in light.values()) > 1e-4
    for parameter, value in light.items():
        torch.testing.assert_close(heavy[parameter], value, atol=0, rtol=0)


def test_phased_teacher_sampling_ends(prompts: Path) -> None:
    method = SGOPD(teacher=teacher(), reference=start(), **student())
    phased = PhasedTeacherSampling(start=0.3, end=0.1, phase1_end=0.25, phase2_end=0.5)
    data = {**demonstrations(teacher=0.5), "callbacks": [phased], "steps": 4}
    seen = run((lambda: method, lambda: data), prompts)
    assert [round(logged["imitation"], 6) for logged in seen.logged] == [0.3, 0.3, 0.1, 0.0]
    shares = [method.trainer.datamodule.mix_at(step).teacher for step in range(4)]  # type: ignore[attr-defined]
    assert shares == [0.5, 0.5, 0.5, 0.0]


def test_ema_teacher_is_resumed_bit_for_bit(prompts: Path, tmp_path: Path) -> None:
    def method() -> DistillationModule:
        return SDFT(teacher=EMATeacher(rate=0.3), **student())

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    whole = run((method, dict), prompts, steps=4, callbacks=[EMATeacherUpdate(), saver()])
    more = {"callbacks": [EMATeacherUpdate()], "ckpt_path": str(tmp_path / "step=2.ckpt")}
    rest = run((method, dict), prompts, steps=4, **more)
    assert [x["loss"] for x in rest.logged[-2:]] == [x["loss"] for x in whole.logged[-2:]]

    other = SDFT(teacher=EMATeacher(rate=0.5), **student())
    with pytest.raises(
        UserError, match=r"holds EMA teachers of \(rate, every, warmup\) \[\[0.3, 1, 0\]\]"
    ):
        run((lambda: other, dict), prompts, steps=4, **more | {"callbacks": [EMATeacherUpdate()]})


def test_one_ema_callback_serves_two_runs(prompts: Path) -> None:
    callback = EMATeacherUpdate()
    for _ in range(2):
        method = SDFT(teacher=EMATeacher(rate=1.0), **student())
        run((lambda method=method: method, dict), prompts, steps=2, callbacks=[callback])  # type: ignore[misc]
        teacher = method.teachers()[0]
        assert isinstance(teacher, EMATeacher)
        moved = teacher.state_dict(method.student)
        for name, parameter in method.student.model.named_parameters():
            assert (moved[name] == parameter).all()


def test_phases_need_a_length_and_a_student(prompts: Path) -> None:
    for data in ({**demonstrations(teacher=1.0)}, {**demonstrations(teacher=0.5), "steps": -1}):
        method = OPD(teacher=teacher(), imitation=0.2, **student())
        more = {**data, "callbacks": [PhasedTeacherSampling()]}
        with pytest.raises(UserError, match="PhasedTeacherSampling: got"):
            run((lambda method=method: method, dict), prompts, **more)  # type: ignore[misc]
