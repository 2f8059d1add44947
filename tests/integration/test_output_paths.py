"""Output paths are checked before the work; results are printed even if writing fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_lightning.cli import main
from opd_lightning.models.student import Student
from tests.integration.test_fit import CONFIG

Said = pytest.CaptureFixture[str]
SMALL = ["--data.sampling.max_new_tokens=4", "--trainer.enable_progress_bar=false"]
COMMANDS = {
    "fit": ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath={}/checkpoints"],
    "validate": ["--out={}/scores.json"],
    "sample": ["--prompt=1+1=", "--html={}/page.html"],
    "export": ["--ckpt_path=configs", "--out={}/student"],
    "write-responses": ["--out={}/written.jsonl"],
}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=[] if name in ("fit", "export") else pytest.mark.slow)
        for name in COMMANDS
    ],
)
def test_it_is_refused_before_weights_load(
    command: str, in_lab: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "load", lambda *_: pytest.fail("weights are loaded"))
    (tmp_path / "file").write_text("kept")
    place = [f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}"]
    more = [word.format(tmp_path / "file") for word in COMMANDS[command]]
    with pytest.raises(SystemExit) as ended:
        main([command, "--config", CONFIG, *place, *SMALL, *more])
    assert ended.value.code == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error")]
    assert len(errors) == 1
    assert str(tmp_path / "file") in errors[0]
    assert (tmp_path / "file").read_text() == "kept"


def test_what_cannot_be_written_is_shown(in_lab: Path, capsys: Said) -> None:
    one = ["--data.validation.sums.prompts.limit=2", "--out=/dev/full"]
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--config", CONFIG, *SMALL, *one])
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "sums" in shown.out
    assert "error: --out: " in shown.err
    assert "'/dev/full'" in shown.err
    assert "Traceback" not in shown.err
