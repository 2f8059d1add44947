"""A run's progress: steps, and the parts of a long one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from opd_lightning.commands.trainer import Trainer
from opd_lightning.run import step_progress
from opd_lightning.run.step_progress import FirstLine, StepProgressBar
from opd_lightning.terminal import progress
from tests.toy_run import Toy, train


def lines(capsys: pytest.CaptureFixture[str], steps: int) -> list[str]:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=4,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StepProgressBar()],
    )
    numbers = torch.ones(4 * steps, 1)
    data: DataLoader[Tensor] = DataLoader(numbers, batch_size=1)  # type: ignore[arg-type]
    trainer.fit(Toy(), data)
    told = re.compile("(step|learn) ")
    return [line for line in capsys.readouterr().err.splitlines() if told.match(line)]


def test_a_long_step_is_told_in_micro_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    monkeypatch.setattr(progress, "LONG_IN_LOGS", 0.0)
    found = [line.split(",")[0] for line in lines(capsys, steps=2)]
    parts = [f"learn {done}/4 micro-batches" for done in (1, 2, 3)]
    assert found == [*parts, "step 1/2", *parts, "step 2/2"]


def test_a_short_step_has_its_own_line_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    found = [line.split(",")[0] for line in lines(capsys, steps=2)]
    assert found == ["step 1/2", "step 2/2"]


def test_a_run_that_is_over_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_progress, "_line", lambda *_: "the first line")
    line = "opd: nothing is left to train: the run is at step 2; raise trainer.max_steps"
    for is_over in (False, True):
        train(tmp_path, 2, callbacks=[FirstLine()])
        said = capsys.readouterr().err
        assert (line in said) is is_over
        assert ("the first line" in said) is not is_over
