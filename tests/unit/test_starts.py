"""Records of starts."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from opd_lightning.run.starts import FILE, git_state, last_start, note_start
from opd_lightning.run.trackers import tracked_runs


def git(*arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_line_for_every_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert note_start(run, step=0, checkpoint=None)
    assert not note_start(run, step=5, checkpoint="last")
    one, two = (json.loads(line) for line in (run / FILE).read_text().splitlines())
    assert (one["step"], one["checkpoint"]) == (0, None)
    assert (two["step"], two["checkpoint"]) == (5, "last")
    assert one["versions"]["torch"] == torch.__version__
    assert one["command"]


def test_a_line_that_was_cut_short_does_not_take_the_next(tmp_path: Path) -> None:
    note_start(tmp_path, step=0)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-20])
    note_start(tmp_path, step=7)
    assert last_start(tmp_path)["step"] == 7
    assert (tmp_path / FILE).read_bytes().count(b"\n") == 2


class OwnLogger(WandbLogger):
    """A user's logger, which connects nowhere."""

    def __init__(self) -> None: ...

    @property
    def version(self) -> str:
        return "abc"


def test_a_logger_derived_from_weights_and_biases_goes_on_with_its_run() -> None:
    run = cast(Trainer, SimpleNamespace(loggers=[OwnLogger()]))
    assert tracked_runs(run) == {"wandb": "abc"}


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    git("init")
    assert git_state() is None  # nothing is committed
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-m", "a")
    state = git_state()
    assert state == {"commit": git("rev-parse", "HEAD"), "dirty": False, "changes": []}
    (tmp_path / "a").write_text("b")
    (tmp_path / "method.py").touch()
    state = git_state()
    assert state is not None
    assert (state["dirty"], state["changes"]) == (True, [" M a", "?? method.py"])


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None
