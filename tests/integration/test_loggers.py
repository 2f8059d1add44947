"""A run goes on, with all of its log, whichever logger it has."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.newest import check_found_again
from opd_lightning.cli import main
from opd_lightning.errors import UserError
from tests.integration.test_fit import CONFIG

FAST = [
    "--trainer.enable_progress_bar=false",
    "--data.train.limit=16",
    "--data.prompts_per_step=4",
    "--data.validation=null",
    "--data.sampling.max_new_tokens=4",
    "--ckpt_path=last",
]


class NamesEachStart(Logger):
    """Like that of Weights & Biases: every start is another version."""

    starts = 0

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        NamesEachStart.starts += 1
        self.steps: list[int] = []

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return f"run-{self.starts}"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def go_on(run: Path, steps: int, kind: str, **settings: str) -> None:
    given = "".join(f", {name}: '{value}'" for name, value in settings.items())
    logger = f"{{class_path: {kind}, init_args: {{save_dir: {run}{given}}}}}"
    main(["fit", "--config", CONFIG, *FAST, f"--trainer.logger={logger}",
          f"--trainer.max_steps={steps}"])  # fmt: skip


@pytest.mark.usefixtures("in_lab")
def test_behind_a_logger_that_names_each_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (1, 2):
        go_on(tmp_path, steps, f"{__name__}.NamesEachStart")
    said = capsys.readouterr().err
    assert said.count("whole checkpoint") == 1
    assert whole(tmp_path / "checkpoints" / "last.ckpt").step == 2


@pytest.mark.usefixtures("in_lab")
def test_a_csv_file_keeps_its_earlier_steps(tmp_path: Path) -> None:
    kind = "lightning.pytorch.loggers.CSVLogger"
    go_on(tmp_path, 2, kind, name="", version="")
    first = rows(tmp_path)
    assert {row["step"] for row in first} == {"0", "1"}
    # A process that was killed after the checkpoint has logged more.
    more = ",".join("7" if name == "step" else "9" for name in first[0])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(f"{more}\n{more[:5]}")
    go_on(tmp_path, 4, kind, name="", version="")
    found = rows(tmp_path)
    assert {row["step"] for row in found} == {"0", "1", "2", "3"}
    assert len(found) == 2 * len(first)
    for old, new in zip(first, found, strict=False):
        assert {name: new[name] for name in old} == old
    assert not list(tmp_path.glob("metrics.csv.*"))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_that_no_restart_can_find_is_refused(tmp_path: Path) -> None:
    check_found_again(tmp_path / "version_0")
    (tmp_path / "version_0" / "checkpoints").mkdir(parents=True)
    check_found_again(tmp_path / "version_1")  # there is nothing to find
    (tmp_path / "version_0" / "checkpoints" / "last.ckpt").touch()
    check_found_again(tmp_path / "version_0")
    with pytest.raises(UserError, match="version_0"):
        check_found_again(tmp_path / "version_1")
