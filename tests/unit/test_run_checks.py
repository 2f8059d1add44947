"""Checks of a run's settings and models before weights load."""

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import callbacks

from opd_lightning.data.mix import TeacherSampler
from opd_lightning.errors import UserError
from opd_lightning.methods import SFT
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine
from opd_lightning.run.model_checks import check_same_tokens, check_usable
from opd_lightning.run.settings import differences
from opd_lightning.run.trainer_checks import check_optimizer, check_trainer
from tests.conftest import TinyModelDir

AdamW = torch.optim.AdamW
Plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
Endless = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=0)


def module(**optimizer: Any) -> Any:
    scheduler = optimizer.pop("scheduler", None)
    return SimpleNamespace(optimizer=partial(AdamW, **optimizer), lr_scheduler=scheduler)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "model.optimizer: Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "model.optimizer: Invalid learning rate: nan"),
        ({"lr": float("inf")}, "model.optimizer.lr: got inf"),
        ({"weight_decay": float("nan")}, "model.optimizer: Invalid weight_decay"),
        ({"betas": (1.5, 0.9)}, "model.optimizer: Invalid beta"),
        ({"scheduler": Plateau}, "model.lr_scheduler: got ReduceLROnPlateau, which waits"),
        ({"scheduler": Endless}, "model.lr_scheduler: CosineAnnealingLR has no learning rate"),
        (
            {"scheduler": partial(torch.optim.lr_scheduler.LinearLR, start_factor=-1.0)},
            "model.lr_scheduler: Starting",
        ),
    ],
)
def test_wrong_optimisers(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer(module(**settings))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("trains", [True, False])
def test_parameters_of_a_method_that_nothing_trains(
    trains: bool, caplog: pytest.LogCaptureFixture
) -> None:
    method = SFT(Student("unused"))
    method.student.model = torch.nn.Linear(1, 1)
    method.value = torch.nn.Linear(1, 1).requires_grad_(trains)
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        optimizer = method.configure_optimizers()
    assert sum(map(torch.numel, optimizer.param_groups[0]["params"])) == 2
    assert ("not the method's own value.bias, value.weight;" in caplog.text) is trains


def test_right_optimisers() -> None:
    check_optimizer(module(lr=1e-5))
    check_optimizer(module(scheduler=partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5)))

    def elsewhere(parameters: Any) -> Any:
        raise RuntimeError("parameters must be on a GPU")

    check_optimizer(cast(Any, SimpleNamespace(optimizer=elsewhere)))


@pytest.mark.parametrize(
    "callback",
    [
        callbacks.WeightAveraging(),
        callbacks.EMAWeightAveraging(),
        callbacks.StochasticWeightAveraging(swa_lrs=0.1),
        callbacks.GradientAccumulationScheduler({0: 2}),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_break_a_run_are_refused_by_name(callback: Any) -> None:
    trainer = SimpleNamespace(
        precision="32-true", callbacks=[callback], val_check_interval=1, accumulate_grad_batches=1
    )
    with pytest.raises(UserError, match=rf"^trainer\.callbacks: got {type(callback).__name__}: "):
        check_trainer(cast(Any, trainer))
    trainer.callbacks = [callbacks.LearningRateMonitor()]
    check_trainer(cast(Any, trainer))


# Student and teacher ----------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model_dir: TinyModelDir) -> Path:
    return tiny_model_dir()


def source(folder: Path, role: str = "student", **settings: Any) -> ModelSource:
    return ModelSource(str(folder), role=role, **settings)


def template(turn_end: str = "<eos>", system: str = "") -> str:
    start = f"{{% if messages[0].role != 'system' %}}{system}{{% endif %}}" if system else ""
    return start + (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}" + turn_end + "{% endfor %}a:"
    )


def grown(source: ModelSource, *tokens: str, special: bool = True) -> ModelSource:
    source.tokenizer.add_tokens([*tokens], special_tokens=special)
    return source


def test_tokens_that_only_the_teacher_has(folder: Path) -> None:
    student, teacher = source(folder), grown(source(folder, "teacher"), "<more>")
    check_same_tokens(student, teacher)
    with pytest.raises(UserError, match=r"'<more>' is id None and 64"):
        check_same_tokens(student, teacher, writes=True)
    with pytest.raises(UserError, match=r"'<more>' is id 64 and None"):
        check_same_tokens(grown(student, "<more>"), source(folder, "teacher"))
    with pytest.raises(UserError, match=r"'<more>' is id 64 and 65"):
        check_same_tokens(student, grown(source(folder, "teacher"), "<other>", "<more>"))


def test_a_base_student_of_a_chat_teacher(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other EOS and other template: refused by what is wrong, right with settings."""
    caplog.set_level(logging.WARNING)
    ours, theirs = template("<eos>"), template(";")
    teacher = source(folder, "teacher", chat_template=theirs)
    teacher.tokenizer.eos_token = ";"
    teacher.eos_ids = (teacher.tokenizer.eos_token_id,)
    with pytest.raises(UserError, match=r"end their turns differently.*student\.eos_tokens"):
        check_same_tokens(source(folder, chat_template=ours), teacher)
    with pytest.raises(UserError, match="have different chat templates"):
        check_same_tokens(source(folder, chat_template=ours, eos_tokens=[";"]), teacher)
    file = tmp_path / "chat.jinja"
    file.write_text(theirs)
    student = source(folder, chat_template=str(file), eos_tokens=[";"])
    check_same_tokens(student, teacher)
    assert student.eos_ids == teacher.eos_ids
    assert not caplog.records
    check_same_tokens(source(folder, chat_template=theirs, eos_tokens=[";", "<eos>"]), teacher)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("1 of the 2 tokens that end the student's responses ('<eos>')")


def test_other_default_system_messages(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    student = source(folder, chat_template=template())
    teacher = source(folder, "teacher", chat_template=template(system="s:hello<eos>"))
    check_same_tokens(student, teacher)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "add different system messages" in line
    assert "of 6 and 14 tokens" in line
    caplog.clear()
    check_same_tokens(student, source(folder, "teacher", chat_template=template()))
    assert not caplog.records


def test_a_template_where_the_folder_has_none(folder: Path) -> None:
    bare = source(folder)
    bare.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"set student\.chat_template to a Jinja file"):
        check_usable(bare)
    check_usable(source(folder, chat_template=template()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chat_template": "nowhere.jinja"}, "student.chat_template: cannot read 'nowhere.jinja'"),
        (
            {"chat_template": "/dev/zero"},
            "student.chat_template: cannot read '/dev/zero': it is no",
        ),
        ({"eos_tokens": ["<end>"]}, "student.eos_tokens: got '<end>', which is no token"),
        ({"eos_tokens": []}, "student.eos_tokens: got none"),
    ],
)
def test_wrong_templates_and_ends(settings: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        _ = source(folder, **settings).tokenizer
    assert str(caught.value).startswith(said)


def test_a_teacher_that_writes_takes_a_template_and_ends(folder: Path) -> None:
    chat: dict[str, Any] = {"chat_template": template(";"), "eos_tokens": [";", "<eos>"]}
    student, engine = source(folder, **chat), HFEngine()
    bare = TeacherSampler(path=str(folder), engine=engine, eos_tokens=chat["eos_tokens"])
    with pytest.raises(UserError, match="have different chat templates"):
        check_same_tokens(student, bare.source, writes=True)
    writer = TeacherSampler(path=str(folder), engine=engine, **chat)
    check_same_tokens(student, writer.source, writes=True)
    assert writer.source.eos_ids == student.eos_ids
    with pytest.raises(UserError, match=r"^data\.teacher\.eos_tokens: got none"):
        _ = TeacherSampler(path=str(folder), engine=engine, eos_tokens=[]).source.tokenizer


# Resumption -------------------------------------------------------------------------------


def test_differences_from_the_checkpoints_run() -> None:
    before = {
        "method": "OPD",
        "teacher.path": "a",
        "optimizer": "AdamW",
        "optimizer.lr": 1e-5,
        "data.sampling.temperature": 1.0,
        "trainer.max_steps": 10,
    }
    now = before | {"teacher.path": "b", "optimizer.lr": 1e-4, "trainer.max_steps": 20}
    now |= {"data.sampling.temperature": 0.7, "method": "GKD"}
    teacher, rate, temperature = differences(before, now)
    assert (
        teacher == "teacher.path: the checkpoint's run had a, this one has b: b counts from here on"
    )
    assert rate.startswith(
        "optimizer.lr: the checkpoint's run had 1e-05, this one has 0.0001: 1e-05"
    )
    assert temperature.endswith("0.7 counts from here on")
    assert differences(before, before) == []
    lines = differences({}, {f"data.x{i}": i for i in range(20)})
    assert len(lines) == 13
    assert lines[-1] == "and 8 more settings differ from the checkpoint's"
