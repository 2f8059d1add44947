"""`opd validate` and `opd test`: a checkpoint and the folder it is exported to score alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml")
SAMPLES = "--data.validation.sums.samples=3"

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def run(in_lab: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    folder = tmp_path / "run"
    main(
        ["fit", "--config", CONFIG, f"--trainer.logger.init_args.save_dir={folder}",
         "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.prompts_per_step=4",
         "--data.sampling.max_new_tokens=8", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    return folder


@pytest.fixture
def measure(capfd: pytest.CaptureFixture[str]) -> Measure:
    """Run `opd validate --json`; what is on stdout is one object and nothing else."""

    def measured(*args: str, command: str = "validate") -> dict[str, Any]:
        capfd.readouterr()
        main([command, *args, "--json"])
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    return measured


def test_a_checkpoint_and_its_exported_folder_score_alike(
    run: Path, measure: Measure, tmp_path: Path
) -> None:
    config = ("--config", str(run / "config.yaml"))
    checkpoint = ("--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    written = tmp_path / "scores.json"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    saved = measure(*config, *checkpoint, SAMPLES, "--out", str(written))
    assert json.loads(written.read_text()) == saved
    assert saved["student"]["checkpoint"] == checkpoint[1]
    assert saved["student"]["step"] == 2
    sums = saved["suites"]["sums"]
    assert sums["prompts"] == 32
    assert sums["samples"] == 3
    assert sums["sampling"]["max_new_tokens"] == 8
    assert {"score", "score_low", "score_high", "length", "truncated", "majority"} <= sums.keys()
    assert {"pass_at_2", "pass_at_3"} <= sums.keys()
    assert set(sums["domains"]) == {"add-2", "sub-2"}
    for domain in sums["domains"].values():
        assert domain["prompts"] == 16
        assert {"score_low", "pass_at_3", "majority", "length", "truncated"} <= domain.keys()
    mean = sum(domain["length"] for domain in sums["domains"].values()) / 2
    assert mean == pytest.approx(sums["length"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    main(["export", *config, *checkpoint, "--out", str(tmp_path / "student")])
    folder = measure(*config, f"--model.student.path={tmp_path / 'student'}", SAMPLES)
    assert folder["student"] == {
        "path": str(tmp_path / "student"), "checkpoint": None, "step": None
    }  # fmt: skip
    assert folder["suites"] == saved["suites"]


@pytest.mark.slow  # tasks in validations: test_many_ranks.py, test_retention.py
def test_tasks_of_the_harness_are_measured_beside_suites(
    in_lab: Path, measure: Measure, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = str(Path(CONFIG).parents[1] / "suites" / "lm_eval.yaml")
    changes = ("--config", CONFIG, "--config", tasks, "--data.validation=null")
    found = measure(*changes, "--data.tasks.written-sums.limit=4")["suites"]
    assert list(found) == ["written-sums", "chosen-sums"]
    assert found["written-sums"]["documents"] == 4
    assert found["written-sums"]["metric"] == "exact_match.last"
    chosen = found["chosen-sums"]
    assert chosen["score"] == chosen["acc_norm"]
    assert chosen["score_low"] < chosen["score"] < chosen["score_high"]
    main(["test", *changes, "--trainer.enable_progress_bar=false"])
    shown = capfd.readouterr()
    lines = [line.split()[:3] for line in shown.out.splitlines()]
    assert ["written-sums", "32", "exact_match.last"] in lines
    assert not [word for word in ("it/s", "Selected", "Running", "WARNING") if word in shown.err]


def test_a_table_for_people(in_lab: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suite = "{sums: {prompts: {path: lab/arithmetic/held_out.jsonl}, samples: 2}}"
    main(
        ["test", "--config", CONFIG, f"--data.test={suite}", "--data.sampling.max_new_tokens=4",
         "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    shown = capfd.readouterr()
    lines = [line.split()[:3] for line in shown.out.splitlines()]
    assert ["sums,", "n=2", "32"] in lines
    assert any(line[:2] == ["add-2", "16"] for line in lines)
    assert "DataLoader 0" not in shown.out  # Lightning's own table


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--out=nowhere/scores.json", "--out: got 'nowhere/scores.json', expected a file"),
        pytest.param("--out=.", "--out: got '.', expected a file", marks=pytest.mark.slow),
        ("--ckpt_path=lab/arithmetic/train.jsonl", "--ckpt_path: 'lab/arithmetic/train.jsonl'"),
        ("--model.student.path=./nowhere", "'./nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    in_lab: Path, capsys: pytest.CaptureFixture[str], change: str, line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--config", CONFIG, "--trainer.logger=false", change])
    assert ended.value.code == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert len(errors) == 1
    assert line in errors[0]
