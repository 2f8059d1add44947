"""Every file that docs/extending.md shows is run, word for word."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor

from opd_lightning.cli import main
from opd_lightning.data.views import PromptView
from opd_lightning.losses.divergence import ReverseKL
from opd_lightning.models.student import Student
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.verifiers import ExactMatch, JudgeVerifier, Reflector
from tests import snippets
from tests.toy import (
    VISITED,
    finite_difference,
    make_scored,
    opd_signal,
    random_logits,
    sequence_probs,
    token_logprobs,
    visit_probabilities,
)

PAGE = "extending.md"
FILES = snippets.files(PAGE)
CONFIG = str(snippets.ROOT / "configs" / "lab" / "opd.yaml")
STUDENT = "--model.init_args.teacher.init_args.path=lab/arithmetic/student"

SHORT = """
data: {prompts_per_step: 8, sampling: {max_new_tokens: 8}}
trainer:
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  limit_val_batches: 0
  callbacks: [tests.integration.test_docs.Watch]
"""

Fit = Callable[..., Any]


class Watch(Callback):
    """Keeps the trainer, and what was logged after every step."""

    trainer: Any
    logged: list[dict[str, float]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        Watch.trainer, Watch.logged = trainer, []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        Watch.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of the page as modules of a package folder on Python's path."""
    snippets.write(PAGE, tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    importlib.invalidate_caches()
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture
def fit(in_lab: Path, shown: Path) -> Fit:
    """Run `opd fit` in this process on the untrained lab, with configurations of the page."""

    def run(*names: str, more: tuple[str, ...] = (), steps: int = 1) -> type[Watch]:
        (shown / "short.yaml").write_text(SHORT)
        configs = [CONFIG, *(str(shown / f"{name}.yaml") for name in ("short", *names))]
        layers = (part for path in configs for part in ("--config", path))
        main(["fit", *layers, f"--trainer.max_steps={steps}", *more])
        return importlib.import_module("tests.integration.test_docs").Watch

    return run


def test_every_file_is_used_below() -> None:
    text = Path(__file__).read_text()
    assert [name for name in FILES if f'"{Path(name).stem}' not in text] == []


def test_the_examples_are_short() -> None:
    lines = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert lines["asymmetric_opd.py"] <= 45
    assert max(lines.values()) <= 60


def test_a_method_a_rule_a_term_and_a_verifier(fit: Fit) -> None:
    watch = fit("power_opd", "skip_sure", "squared_ratio", "contains")
    method = watch.trainer.lightning_module
    assert (type(method).__name__, method.alpha) == ("PowerOPD", 0.3)
    assert method.teacher.source.path == "lab/arithmetic/teacher"  # of the configuration below
    assert method.rules[0].nats == 0.1
    assert watch.trainer.datamodule.verifier.word == "1"
    (logged,) = watch.logged
    assert logged["optim/gradient_norm"] > 1e-4
    assert 0 < logged["rule/skip_sure/kept"] <= 1
    assert logged["term/squared_ratio"] > 0
    assert 0 <= logged["reward"] <= 1


@pytest.mark.parametrize(
    "name", [pytest.param("power_opd", marks=pytest.mark.slow), "asymmetric_opd"]
)
def test_a_teacher_that_is_the_student_teaches_nothing(name: str, fit: Fit) -> None:
    (logged,) = fit(name, more=(STUDENT,)).logged
    assert logged["optim/gradient_norm"] < 1e-6


def test_a_verifier_by_domain(fit: Fit, tmp_path: Path) -> None:
    rows = [
        {"messages": "1+1", "domain": "math", "answer": "2"},
        {"messages": "2+2", "domain": "code", "answer": "assert f(1) == 2"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (f"--data.train.path={path}", "--data.prompts_per_step=2", "--data.validation=null")
    (logged,) = fit("two_skills", more=(*more, "--trainer.limit_val_batches=0")).logged
    assert logged["reward"] == logged["reward/math"] == logged["reward/code"] == 0


def test_a_judge(shown: Path) -> None:
    """Its class takes the arguments of the page; tests/unit/test_judge.py has a server."""
    settings = yaml.safe_load((shown / "judge.yaml").read_text())["data"]["verifier"]
    assert settings["class_path"] == "opd_lightning.verifiers.JudgeVerifier"
    assert JudgeVerifier(**settings["init_args"]).choices == {"yes": 1, "no": 0}


def test_a_reflector(shown: Path) -> None:
    """As the judge; tests/unit/test_reflector.py has a server."""
    data = yaml.safe_load((shown / "reflector.yaml").read_text())["data"]
    settings = data["verifier"]["init_args"]
    assert data["verifier"]["class_path"] == "opd_lightning.verifiers.Reflector"
    assert settings.pop("verifier") == {"class_path": "opd_lightning.verifiers.MathVerifier"}
    assert Reflector(ExactMatch(), **settings).chat.model == "reflector"
    assert "feedback" in PromptView(**data["views"]["note"]).variables


def test_two_losses_by_token(fit: Fit) -> None:
    micro_batches = ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2")
    watch = fit("asymmetric_opd", more=micro_batches)
    assert type(watch.trainer.lightning_module).__name__ == "AsymmetricOPD"
    assert watch.logged[-1]["optim/gradient_norm"] > 1e-4


def test_a_divergence(fit: Fit) -> None:
    watch = fit("triangular")
    assert watch.trainer.lightning_module.comparisons()["loss"].function.scale == 0.5
    assert watch.logged[0]["loss"] > 0


def test_a_teacher(fit: Fit) -> None:
    watch = fit("floored")
    assert watch.trainer.lightning_module.teacher.floor == -2.0
    assert watch.logged[0]["signal/log_ratio_mean"] > -2.0


def test_a_rule_with_state(fit: Fit) -> None:
    more = ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2")
    watch = fit("running_clip", more=more)
    rule = watch.trainer.lightning_module.rules[0]
    assert rule.state_dict() == {"bound": rule.bound, "step": 0}
    # Of eight tenths of the tokens |d_t| is below the bound.
    assert 0.1 < watch.logged[-1]["rule/running_clip/clipped"] < 0.3


def test_a_teacher_of_two(fit: Fit) -> None:
    """Of the teacher and the student: its d_t is half of the teacher's."""
    half, whole = (fit(*names).logged[0] for names in (("two_teachers",), ()))
    name = "signal/log_ratio_mean"
    assert half[name] == pytest.approx(whole[name] / 2, rel=1e-4)


def test_a_source_of_prompts(fit: Fit) -> None:
    source = fit("doubles").trainer.datamodule.train
    assert type(source).__name__ == "Doubles"
    prompts = source.load()
    assert [prompt.answer for prompt in prompts] == [str(2 * i) for i in range(20)]
    assert prompts[3].messages == ({"role": "user", "content": "3+3="},)


def test_an_engine(fit: Fit) -> None:
    first, *later = (logged["response/length"] for logged in fit("short_first", steps=3).logged)
    assert first <= 2 < min(later)


def test_a_callback(fit: Fit) -> None:
    more = (
        "--data.mix.recorded=0.5",
        "--data.train.path=lab/arithmetic/demonstrations.jsonl",
        "--model.init_args.imitation=0.5",
    )
    watch = fit("fading", more=more, steps=2)
    assert [watch.trainer.datamodule.mix_at(step).recorded for step in (0, 1)] == [0.5, 0.0]
    assert len(watch.logged) == 2


def test_a_suite(in_lab: Path, shown: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = str(shown / "fixed_answers.yaml")
    main(
        ["validate", "--config", CONFIG, "--config", config, "--data.validation=null",
         "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["facts", "0.000"] in lines


# Asymmetric OPD on the tree -----------------------------------------------------------------


def asymmetric(module: ModuleType, at: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Token losses `[S, T]` of all sequences, differentiable in `student`, decided at `at`."""
    method = module.AsymmetricOPD(Student("nowhere"), FrozenTeacher("nowhere"))
    ours, theirs = token_logprobs(student), token_logprobs(teacher)
    scored = make_scored(token_logprobs(at), theirs)
    scores = replace(scored.student, logprobs=ours)
    local = method.divergence(student.log_softmax(-1), teacher.log_softmax(-1))[VISITED]
    signal = replace(opd_signal(scored), advantage=method.advantage(scored))
    (name,) = method.comparisons()
    loss: Tensor = method.token_loss(scores, signal, scored, {name: local})
    return loss


def expected(module: ModuleType, logits: Tensor, teacher: Tensor) -> Tensor:
    """Exact expectation of the gradient over all sequences."""
    student = logits.clone().requires_grad_()
    losses = asymmetric(module, logits, student, teacher)
    (gradient,) = torch.autograd.grad((sequence_probs(logits)[:, None] * losses).sum(), student)
    return gradient


@pytest.fixture
def module(shown: Path) -> ModuleType:
    return importlib.import_module("asymmetric_opd")


def test_asymmetric_opd_has_the_gradient_of_its_formula(module: ModuleType) -> None:
    """Per prefix: -sum_{d > 0} S d grad log S + S(d <= 0) grad KL(S || T)."""
    logits, teacher = random_logits(0), random_logits(1)
    probs = logits.softmax(-1)  # [P, V]
    ratio = teacher.log_softmax(-1) - logits.log_softmax(-1)
    liked = ratio > 0
    visits = visit_probabilities(logits)[:, None]
    # grad of log S(a) in the logits is onehot(a) - S.
    pull = torch.where(liked, probs * -ratio, 0.0)
    by_policy = pull - pull.sum(-1, keepdim=True) * probs
    kl = (probs * -ratio).sum(-1, keepdim=True)
    by_divergence = probs * (-ratio - kl)
    rest = torch.where(liked, 0.0, probs).sum(-1, keepdim=True)
    closed = visits * (by_policy + rest * by_divergence)

    def objective(at: Tensor) -> Tensor:
        pushed = (pull * at.log_softmax(-1)).sum(-1)
        local = rest[:, 0] * ReverseKL()(at.log_softmax(-1), teacher.log_softmax(-1))
        return (visits[:, 0] * (pushed + local)).sum()

    found = expected(module, logits, teacher)
    torch.testing.assert_close(found, closed, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found, finite_difference(objective, logits), atol=1e-7, rtol=1e-6)
    assert found.abs().max() > 1e-2


def test_asymmetric_opd_of_equal_models_has_no_gradient(module: ModuleType) -> None:
    logits = random_logits(0)
    assert expected(module, logits, logits.clone()).abs().max() < 1e-15
