"""`--ckpt_path last`: all commands use a run's newest whole checkpoint and report it."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from opd_lightning.cli import main
from tests.integration.test_fit import CONFIG
from tests.unit.test_checkpoints import flip

Said = pytest.CaptureFixture[str]
OWN = {
    "export": ["--out={}/student"],
    "sample": ["--prompt=1+1="],
    "write-responses": ["--out={}/written.jsonl"],
}


def refusing(quick: str) -> list[Any]:
    """One command, of Lightning's or of ours; the others take the ways of these."""
    names = ("validate", "export", "sample", "write-responses")
    return [pytest.param(n, marks=[] if n == quick else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def run(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose newest checkpoint is damaged and the one before whole."""
    folder = tmp_path_factory.mktemp("run")
    short = ["--trainer.max_steps=1", "--data.prompts_per_step=4", "--data.train.limit=3"]
    quiet = ["--data.sampling.max_new_tokens=4", "--trainer.enable_progress_bar=false"]
    place = f"--trainer.logger.init_args.save_dir={folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained_lab)
        main(["fit", "--config", CONFIG, place, *short, *quiet])
    last = folder / "checkpoints" / "last.ckpt"
    copy(last, last.with_name("whole.ckpt"))
    flip(last)
    return folder


def words(command: str, run: Path, out: Path) -> list[str]:
    more = [word.format(out) for word in OWN.get(command, ["--json"])]
    return [command, "--config", f"{run}/config.yaml", "--ckpt_path=last", *more]


@pytest.mark.parametrize(
    "command", ["export", "sample", pytest.param("write-responses", marks=pytest.mark.slow)]
)
def test_it_is_taken_and_named(
    in_lab: Path, run: Path, command: str, tmp_path: Path, capsys: Said
) -> None:
    main(words(command, run, tmp_path))
    shown = capsys.readouterr()
    passed, taken = [line for line in shown.err.splitlines() if line.startswith("opd: ")][:2]
    assert "last.ckpt'" in passed
    assert taken == f"opd: --ckpt_path last: '{run}/checkpoints/whole.ckpt', step 1"
    if command == "export":
        assert "the student of step 1" in shown.out
    if command == "write-responses":
        (first, *_) = (tmp_path / "written.jsonl").read_text().splitlines()
        assert "checkpoints/whole.ckpt of step 1, " in json.loads(first)["written_by"]


def test_a_measurement_takes_it_and_names_it(in_lab: Path, run: Path, capsys: Said) -> None:
    main([*words("validate", run, run), "--data.validation.sums.prompts.limit=2"])
    student = json.loads(capsys.readouterr().out)["student"]
    assert student["checkpoint"] == f"{run}/checkpoints/whole.ckpt"
    assert student["step"] == 1


@pytest.mark.parametrize("command", refusing("export"))
def test_none_is_one_line(
    in_lab: Path, run: Path, command: str, tmp_path: Path, capsys: Said
) -> None:
    elsewhere = f"--trainer.logger.init_args.save_dir={tmp_path}"
    line = f"but no whole checkpoint is in '{tmp_path}/checkpoints'"
    assert line in refusal([*words(command, run, tmp_path), elsewhere], capsys)


@pytest.mark.parametrize("command", refusing("validate"))
def test_no_folder_is_one_line(
    in_lab: Path, run: Path, command: str, tmp_path: Path, capsys: Said
) -> None:
    nowhere = ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    line = refusal([*words(command, run, tmp_path), *nowhere], capsys)
    assert "without a ModelCheckpoint" in line


def refusal(command: list[str], capsys: Said) -> str:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error")]
    assert "--ckpt_path: got 'last'" in line
    return line
