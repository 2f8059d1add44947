"""`rollouts.jsonl` has every step once, whenever the run was killed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import RolloutLog


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "response": "x"}) + "\n" for step in steps)


def start(folder: Path, step: int) -> None:
    trainer: Any = SimpleNamespace(log_dir=str(folder), is_global_zero=True, global_step=step)
    RolloutLog().on_train_start(trainer, None)


@pytest.mark.parametrize(
    ("now", "before", "step", "kept_now", "kept_before"),
    [
        ((5, 5, 6, 6), (3, 4), 6, (5, 5), (3, 4)),
        ((5, 6), (3, 4), 9, (5, 6), (3, 4)),
        ((5, 6), (3, 4), 4, (), (3,)),  # the file was rotated after the checkpoint
        ((5, 6), (3, 4), 0, (), ()),
    ],
)
def test_later_steps_of_an_earlier_process_are_removed(
    now: tuple[int, ...],
    before: tuple[int, ...],
    step: int,
    kept_now: tuple[int, ...],
    kept_before: tuple[int, ...],
    tmp_path: Path,
) -> None:
    file, old = tmp_path / "rollouts.jsonl", tmp_path / "rollouts.jsonl.1"
    file.write_text(lines(*now) + '{"step": 9, "resp')  # killed while it wrote
    old.write_text(lines(*before))
    start(tmp_path, step)
    assert file.read_text() == lines(*kept_now)
    assert old.read_text() == lines(*kept_before)


def test_without_a_file_nothing_is_made(tmp_path: Path) -> None:
    start(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
