"""A run goes on, with all of its log, whichever logger it has."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger, WandbLogger

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.newest import check_found_again
from opd_lightning.cli import main
from opd_lightning.errors import UserError
from opd_lightning.run.trackers import WANDB_RUN, continue_tracked_run
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
    given = {"class_path": kind, "init_args": {"save_dir": str(run), **settings}}
    fit(steps, f"--trainer.logger={json.dumps(given)}")


def fit(steps: int, *more: str) -> None:
    main(["fit", "--config", CONFIG, *FAST, f"--trainer.max_steps={steps}", *more])


@pytest.mark.slow  # a logger that numbers its folders is tested below
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
    # A run that is over, and a start that is refused, leave it as it is.
    go_on(tmp_path, 4, kind, name="", version="")
    assert rows(tmp_path) == found
    place = f"{{class_path: {kind}, init_args: {{save_dir: {tmp_path}, name: '', version: ''}}}}"
    with pytest.raises(SystemExit):
        fit(5, f"--trainer.logger={place}", "--model.student.path=lab/arithmetic/teacher")
    assert rows(tmp_path) == found
    assert not list(tmp_path.glob("metrics.csv.*"))
    assert "| prompt | author |" in (tmp_path / "tables/rollouts/000000.md").read_text()
    picture = (tmp_path / "pictures/signal/by_depth/000000.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


CSV, BOARD = (f"lightning.pytorch.loggers.{name}Logger" for name in ("CSV", "TensorBoard"))


@pytest.mark.usefixtures("in_lab")
def test_the_run_folder_does_not_depend_on_loggers(tmp_path: Path) -> None:
    """No logger, one that numbers its folders, and two: the run goes on."""
    run, place = tmp_path / "run", f"{{save_dir: {tmp_path}/elsewhere}}"
    loggers = (
        "false",
        f"{{class_path: {CSV}, init_args: {place}}}",
        f"[{{class_path: {CSV}, init_args: {place}}}, {{class_path: {BOARD}, init_args: {place}}}]",
    )
    for steps, logger in enumerate(loggers, 1):
        fit(steps, f"--trainer.logger={logger}", f"--trainer.default_root_dir={run}")
        assert whole(run / "checkpoints" / "last.ckpt").step == steps
    assert {"config.yaml", ".prompts.json", ".lock"} <= {path.name for path in run.iterdir()}
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 1, 2]
    assert (run / "pictures/signal/by_depth/000000.png").is_file()
    assert not list(tmp_path.glob("elsewhere/**/*.ckpt"))
    assert list(tmp_path.glob("elsewhere/**/events.out.tfevents.*"))


@pytest.mark.usefixtures("in_lab")
def test_weights_and_biases_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(WANDB_RUN, "")  # restored after the test
    monkeypatch.delenv(WANDB_RUN)
    go_on(tmp_path, 1, "lightning.pytorch.loggers.WandbLogger")
    assert wandb.run is not None
    assert wandb.run.config["data.prompts_per_step"] == 4
    name = wandb.run.id
    wandb.finish()
    # The library reads the environment once a process, so the next start is not made here.
    restarts: Any = SimpleNamespace(loggers=[WandbLogger(save_dir=tmp_path, id="another")])
    continue_tracked_run(restarts, tmp_path)
    assert WANDB_RUN not in os.environ
    restarts.loggers = [WandbLogger(save_dir=tmp_path)]
    continue_tracked_run(restarts, tmp_path)
    assert os.environ[WANDB_RUN] == name
    media = {path.parent.name for path in tmp_path.glob("wandb/*/files/media/**/*.*")}
    assert {"table", "signal"} <= media  # the rollouts and the picture


@pytest.mark.usefixtures("in_lab")
def test_mlflow_takes_figures_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    settings = {"class_path": "lightning.pytorch.loggers.MLFlowLogger",
                "init_args": {"save_dir": str(tmp_path / "mlruns")}}  # fmt: skip
    for steps in (1, 2):
        fit(steps, f"--trainer.logger={json.dumps(settings)}", f"--trainer.default_root_dir={run}")
    assert whole(run / "checkpoints" / "last.ckpt").step == 2
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted(point.step for run in runs for point in client.get_metric_history(
        run.info.run_id, "loss")) == [0, 1]  # fmt: skip
    first = max(runs, key=lambda run: len(run.data.params))
    assert first.data.params["data.prompts_per_step"] == "4"
    kept = {
        path.relative_to(tmp_path / "mlruns").parts[3:]
        for path in (tmp_path / "mlruns").rglob("000000.*")
    }
    assert {("rollouts", "000000.md"), ("signal", "by_depth", "000000.png")} <= kept


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
    with pytest.raises(UserError, match="default_root_dir"):
        check_found_again(tmp_path / "run", former=tmp_path / "version_0")
    kept = [tmp_path / "version_0" / "checkpoints"]  # where ModelCheckpoint.dirpath says
    check_found_again(tmp_path / "version_1", tmp_path / "version_0", kept)
