"""One command starts a run and continues it: `opd fit --ckpt_path last`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from tests.integration.test_fit import CONFIG
from tests.unit.test_checkpoints import flip

Err = pytest.CaptureFixture[str]

SHORT = [
    "--config",
    CONFIG,
    "--config",
    str(Path(CONFIG).parents[1] / "strategy" / "ddp.yaml"),
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--data.prompts_per_step=4",
    "--data.sampling.max_new_tokens=8",
]


def one_line(ended: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in ended.stderr, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("opd: error")]
    return line


def command(run: Path, *changes: str, ranks: int = 1) -> list[str]:
    save_dir = f"--trainer.logger.init_args.save_dir={run}"
    return ["fit", *SHORT, f"--trainer.devices={ranks}", save_dir, "--ckpt_path=last", *changes]


def test_the_same_command_starts_and_continues(in_lab: Path, tmp_path: Path, capsys: Err) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    other = ["--data.sampling.temperature=0.9", "--model.optimizer.lr=0.5"]
    for steps in (1, 2):
        main(command(tmp_path, f"--trainer.max_steps={steps}", *(other if steps == 2 else [])))
        assert torch.load(last, weights_only=True)["global_step"] == steps
        said = capsys.readouterr().err
        assert ("starts from the beginning" in said) == (steps == 1)
        told = [line for line in said.splitlines() if "the checkpoint's" in line]
        assert len(told) == (0 if steps == 1 else 2)
        if told:
            rate, temperature = sorted(told, key=lambda line: "temperature" in line)
            assert "optimizer.lr: " in rate
            assert "counts, which is saved with its state" in rate
            assert "0.9" in temperature
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        main(command(tmp_path, "--model.student.path=lab/arithmetic/teacher"))
    assert "is not of this run's model: " in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == config
    flip(last)
    for words, message in (
        (["validate", "--config", f"{tmp_path}/config.yaml"], "other bytes"),
        (["export", "--config", f"{tmp_path}/config.yaml", "--out=out"], "other bytes"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, f"--ckpt_path={last}"])
        assert ended.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error")]
        assert message in line
    with pytest.raises(SystemExit):
        main(command(tmp_path, "--weights_only=false"))
    assert "weights_only" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_ends_a_run_of_two_processes_in_one_line(in_lab: Path, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    fit = [sys.executable, "-m", "opd_lightning"]
    try:
        ended = subprocess.run(
            [*fit, *command(tmp_path, "--trainer.max_steps=2", ranks=2)],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert ended.returncode == 1
        line = one_line(ended)
        assert "No space left on device" in line
        assert str(tmp_path) in line
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
