"""A prompt file that changes while a run goes on, and before it is resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from opd_lightning.cli import main
from tests.integration.test_fit import CONFIG
from tests.integration.test_interrupted import FAST


class Meddler(Callback):
    """Appends to the prompt files after the first step, and ends the run after the third."""

    def __init__(self, more: str = "", stops: bool = False) -> None:
        self.more = more
        self.stops = stops

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        data = trainer.datamodule
        if trainer.global_step == 1:
            for source in (data.train, data.suites_of("validate")["sums"].prompt_source):
                with Path(source.path).open("a") as opened:
                    opened.write(self.more)
        if trainer.global_step == 3 and self.stops:
            trainer.should_stop = True


def run(folder: Path, *changes: str, more: str = "", stops: bool = False) -> dict[str, Tensor]:
    """The student's weights after a run on the folder's own prompt files."""
    callbacks: list[dict[str, Any]] = [
        {"class_path": "ModelCheckpoint",
         "init_args": {"every_n_train_steps": 1, "save_last": True}},
        {"class_path": f"{__name__}.Meddler", "init_args": {"more": more, "stops": stops}},
    ]  # fmt: skip
    # Given one by one, each option would parse all callbacks again.
    short = {"trainer": {"callbacks": callbacks, "val_check_interval": 2 * 6}}
    (folder / "short.yaml").write_text(json.dumps(short))
    prompts = ("data.train.path", "data.validation.sums.prompts.path")
    paths = [f"--{name}={folder / file}.jsonl" for name, file in zip(prompts, FILES, strict=True)]
    save = f"--trainer.logger.init_args.save_dir={folder / 'run'}"
    limits = ("--data.train.limit=null", "--data.validation.sums.prompts.limit=null")
    files = ("--config", CONFIG, *FAST, "--config", str(folder / "short.yaml"))
    main(["fit", *files, *limits, save, *paths, *changes])
    saved = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, Tensor] = saved["state_dict"]
    return weights


FILES = ("train", "held_out")


@pytest.fixture
def folders(in_lab: Path, tmp_path: Path) -> list[Path]:
    """Two users' folders with the same prompts."""
    both = [tmp_path / name for name in ("quiet", "busy")]
    for folder in both:
        folder.mkdir()
        for file in FILES:
            shutil.copy(in_lab / "lab" / "arithmetic" / f"{file}.jsonl", folder)
    return both


def test_a_run_and_its_resumption_keep_the_prompts_they_began_with(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, busy = folders
    expected = run(quiet)
    run(busy, more='{"prompt": 7, "answer"', stops=True)
    capsys.readouterr()
    last = f"--ckpt_path={busy / 'run' / 'checkpoints' / 'last.ckpt'}"
    torch.testing.assert_close(run(busy, last), expected, atol=0, rtol=0)
    grown = [line for line in capsys.readouterr().err.splitlines() if "bytes since" in line]
    grown = sorted(line.split(":")[1].strip() for line in grown)
    assert grown == ["data.train", "data.validation.sums"]

    held_out = busy / "held_out.jsonl"
    held_out.write_text(held_out.read_text().replace("1", "2", 1))
    with pytest.raises(SystemExit) as exit_:
        run(busy, last)
    assert exit_.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error")]
    assert "data.validation.sums: " in line
    assert "held_out.jsonl" in line
