"""Callbacks that monitor a figure which the run does not log."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from opd_lightning.errors import UserError
from opd_lightning.run.monitors import check_monitors
from tests.toy_run import Toy, train


@pytest.fixture(autouse=True)
def _in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where a ModelCheckpoint without a folder saves


class Validated(Toy):
    """Is validated after every step."""

    def validation_step(self, *_: Any) -> None:
        pass

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "callback",
    [ModelCheckpoint(monitor="los"), EarlyStopping("los")],
    ids=lambda c: type(c).__name__,
)
def test_a_figure_that_is_absent_is_said_in_one_line(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, 2, module=Validated(), callbacks=[callback], val_check_interval=1)
    assert str(caught.value) == (
        f"trainer.callbacks: {type(callback).__name__}.monitor: got 'los', expected a figure that "
        "the run logs, such as 'loss'; correct it, and resume with --ckpt_path last"
    )


def test_other_errors_stay(tmp_path: Path) -> None:
    class Broken(ModelCheckpoint):
        def on_train_start(self, *_: Any) -> None:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        train(tmp_path, 1, callbacks=[Broken(monitor="los")])


@pytest.mark.parametrize(("monitor", "times"), [("los", 1), ("loss", 0)])
def test_a_save_without_its_figure_is_warned_of_once(
    monitor: str, times: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(monitor=monitor, every_n_train_steps=1)
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        train(tmp_path, 3, callbacks=[saver])
    assert caplog.text.count("saved nothing after step 1, since nothing has logged") == times


@pytest.mark.parametrize(
    ("monitor", "is_known"),
    [("val/sums/score", True), ("loss", True), ("val/sum/score", False), ("val/sums", False)],
)
def test_a_suite_that_is_absent_is_warned_of(
    monitor: str, is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = SimpleNamespace(callbacks=[ModelCheckpoint(monitor=monitor), object()])
    with caplog.at_level(logging.WARNING, "opd_lightning"):
        check_monitors(trainer, ["sums", "facts"])
    said = f"ModelCheckpoint monitors {monitor!r}, but the suites are sums, facts"
    assert (said in caplog.text) is not is_known
