"""The model card of an exported student."""

from pathlib import Path
from typing import Any

import yaml

from opd_lightning.checkpoints.reading import Saved
from opd_lightning.commands.model_card import model_card
from opd_lightning.methods import GOPD
from opd_lightning.models.student import Student
from opd_lightning.teachers import ByDomainTeacher, FrozenTeacher

STATE: dict[str, Any] = {
    "log": {
        "monitored": {
            "loss": 0.25,
            "reward": 0.5,
            "signal/log_ratio_mean": -0.1,
            "val/sums/score": 0.875,
            "val/sums/add-2/score": 1.0,
            "val/texts/kl": float("nan"),
        },
        "settings": {"method": "GOPD", "scale": 1.25, "data.train.path": "/home/me/rows.jsonl"},
    }
}


def card(state: dict[str, Any], written_by: dict[str, Any], start: str = "org/small") -> str:
    teacher = ByDomainTeacher({"math": FrozenTeacher("org/m"), "code": FrozenTeacher("/x/coder")})
    method = GOPD(Student(start), teacher, FrozenTeacher("org/small"))
    saved = Saved(
        path=Path("last.ckpt"),
        step=1200,
        time=0.0,
        sizes={},
        shapes={},
        resumable=True,
        written_by=written_by,
        is_sealed=True,
    )
    return model_card(method, "my-model", saved, state)


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_card_says_what_was_trained_and_measured() -> None:
    text = card(STATE, {"method": "GOPD"})
    assert front(text)["base_model"] == "org/small"
    assert "gopd" in front(text)["tags"]
    lines = text.splitlines()
    for line in (
        "# my-model",
        "| student before training | org/small |",
        "| teacher | FrozenTeacher org/m |",
        "| teacher | FrozenTeacher coder |",
        "| reference | FrozenTeacher org/small |",
        "| sums | score | 0.875 |",
        "| sums | add-2/score | 1 |",
        "| loss | 0.25 |",
        "| scale | 1.25 |",
        "| data.train.path | rows.jsonl |",
    ):
        assert line in lines
    assert "after 1,200 optimiser steps of GOPD" in text
    assert "/home" not in text
    assert "nan" not in text


def test_a_checkpoint_without_settings_has_a_card(tmp_path: Path) -> None:
    text = card({}, {"method": "OPD"}, start=str(tmp_path))
    assert "base_model" not in front(text)
    assert "## Settings" not in text
    assert "## Scores" not in text
    assert "steps of OPD with" in text  # not of the method in the configuration
