"""A folder whose weights are not those of its config.json is refused, and never trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.teachers import FrozenTeacher
from tests.conftest import TinyModelDir

Weights = dict[str, torch.Tensor]


def drop(weights: Weights) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def add(weights: Weights) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


def reshape(weights: Weights) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].clone()


@pytest.fixture
def broken(tiny_model_dir: TinyModelDir, tmp_path: Path) -> Callable[..., Path]:
    def make(change: Callable[[Weights], None]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir(), folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "lacks tensor 'model.layers.1.mlp.up_proj.weight'"),
        (add, "holds beside the architecture's own tensor 'model.layers.7.mlp.up_proj.weight'"),
        (reshape, "in another shape than config.json says tensor 'model.layers.0.mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_is_refused(
    broken: Callable[..., Path],
    tiny_model_dir: TinyModelDir,
    change: Callable[[Weights], None],
    said: str,
    role: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = str(broken(change))
    student = Student(folder if role == "student" else str(tiny_model_dir()))
    if role == "teacher":
        student.load()
    load = {
        "student": student.load,
        "teacher": lambda: FrozenTeacher(folder).load(torch.device("cpu"), student),
    }[role]
    with pytest.raises(UserError) as refused:
        load()
    assert "LOAD REPORT" not in caplog.text
    line = str(refused.value)
    assert role in line
    assert said in line
    assert "\n" not in line
    assert len(line) <= 400


def test_a_layer_more_in_the_config(broken: Callable[..., Path]) -> None:
    folder = broken(lambda weights: None)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] = [*config["layer_types"], config["layer_types"][-1]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks tensor 'model\.layers\.2\..* and \d+ more"):
        Student(str(folder)).load()


def test_a_tied_head_is_not_missing(tiny_model_dir: TinyModelDir) -> None:
    for tie in (True, False):
        student = Student(str(tiny_model_dir(tie=tie)))
        student.load()
        assert ModelSource(str(tiny_model_dir(tie=tie))).config.tie_word_embeddings is tie
