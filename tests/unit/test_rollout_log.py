"""`rollouts.jsonl` has every step once, whenever the run was killed."""

from __future__ import annotations

import json
import locale
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import RolloutLog, rollout_log
from tests.batches import make_batch, make_rollout


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


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("ascii_locale")
def test_a_rollout_may_have_any_character_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_log, "token_texts", lambda *_: ["\N{SNOWMAN}"])
    rollout = make_rollout([5], reward=math.nan)
    rollout = replace(rollout, text="\N{SNOWMAN}", behaviour_logprobs=[-math.inf])
    trainer: Any = SimpleNamespace(
        log_dir=str(tmp_path), is_global_zero=True, global_step=0, loggers=[]
    )
    module: Any = SimpleNamespace(
        token_figures={}, student=SimpleNamespace(source=SimpleNamespace(tokenizer=None))
    )
    log = RolloutLog()
    log.on_train_start(trainer, module)
    log.after_loss(trainer, module, make_batch([rollout]))
    log.teardown(trainer, module, "fit")
    line = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8")
    assert "\N{SNOWMAN}" in line
    found = json.loads(line, parse_constant=pytest.fail)  # NaN and infinity are no JSON
    assert (found["reward"], found["logprobs"]) == (None, [None])
    assert r"\u2603" in (tmp_path / "rollouts" / "000000.html").read_text(encoding="utf-8")


def test_without_a_file_nothing_is_made(tmp_path: Path) -> None:
    start(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
