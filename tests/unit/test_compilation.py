"""Students and teachers whose layers torch.compile has compiled equal those that it has not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from opd_lightning.errors import UserError
from opd_lightning.models.compilation import check_compiler, compile_layers
from opd_lightning.models.student import Student
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from opd_lightning.types import RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.families import family_model, write_family


def batch_of(*lengths: int) -> RolloutBatch:
    return make_batch([make_rollout([7 + i] * n, prompt_ids=[5]) for i, n in enumerate(lengths)])


BATCHES = [batch_of(5, 3), batch_of(9, 2, 7), batch_of(4)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Trace the layers, as inductor would, and run the traces as they are: that is quick."""
    real, counter = torch.nn.Module.compile, CompileCounter()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **more: real(self, **more | {"backend": counter})
    )
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def gradients(student: Student) -> dict[str, Tensor]:
    student.zero_grad()
    for batch in BATCHES:
        student.score(batch).logprobs.sum().backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


# The second has layers of two kinds.
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma3_text"])
def test_a_compiled_student(
    name: str, checkpointing: bool, tmp_path: Path, traced: CompileCounter
) -> None:
    """Equal gradients and names of weights; one compilation for all layers and lengths."""
    path = str(write_family(tmp_path, name))
    students = []
    for on in (False, True):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        student = Student(path, compile=on, gradient_checkpointing=checkpointing, lora=lora)
        student.load()
        students.append(student)
    plain, compiled = students
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(gradients(compiled), gradients(plain))
    assert 0 < traced.frame_count <= 4


def test_compiled_teachers(tmp_path: Path, traced: CompileCounter) -> None:
    path = str(write_family(tmp_path, "qwen3"))
    student = Student(path, compile=True)
    student.load()
    teachers: list[Any] = [FrozenTeacher(path), FrozenTeacher(path, compile=True), EMATeacher()]
    for teacher in teachers:
        teacher.load(torch.device("cpu"), student)
    for batch in BATCHES:
        plain, frozen, moving = (teacher.score(batch, "student").logprobs for teacher in teachers)
        torch.testing.assert_close(frozen, plain)
        torch.testing.assert_close(moving, plain)
    assert traced.frame_count > 0


def test_a_model_without_names_of_layers_is_refused() -> None:
    model = family_model("qwen3")
    model._no_split_modules = model.model._no_split_modules = None
    with pytest.raises(UserError, match="does not name its layers"):
        compile_layers(model)


def test_a_missing_compiler_is_found_before_weights_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_compiler.cache_clear()
    for model in (Student("nowhere", compile=True), FrozenTeacher("nowhere", compile=True)):
        with pytest.raises(UserError, match="compile: got true") as raised:
            model.check() if isinstance(model, Student) else model.check_model(Student("nowhere"))
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) <= 400
