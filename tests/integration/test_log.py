"""Output of a run on stderr when stderr is a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"


def log_of(command: list[str], folder: Path, log: Path) -> tuple[str, bytes]:
    """A real start's stderr, a file without anything that moves a cursor, and its stdout."""
    set_here = ("SLURM_", "HF_HUB_DISABLE", "TQDM_")
    own = {k: v for k, v in os.environ.items() if not k.startswith(set_here)}
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=file, timeout=300
        )
    assert done.returncode == 0, log.read_text()
    assert not re.search(rb"[\r\x1b]", log.read_bytes())
    return log.read_text(), done.stdout


@pytest.mark.slow
def test_a_run_of_two_ranks_is_told_once_and_in_lines(in_lab: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "opd_lightning", "fit"),
        *("--config", str(CONFIGS / "lab" / "opd.yaml")),
        *("--config", str(CONFIGS / "strategy" / "ddp.yaml")),
        *("--trainer.devices=2", "--trainer.max_steps=3", "--trainer.val_check_interval=3"),
        *("--data.prompts_per_step=8", "--data.sampling.max_new_tokens=8"),
        "--data.texts={'worked': {'prompts': {'path': 'lab/arithmetic/demonstrations.jsonl'}}}",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}",
    ]
    lines, stdout = log_of(command, in_lab, tmp_path / "log")
    assert stdout == b""
    first = (
        r"^opd: OPD trains lab/arithmetic/student \([\d,]+ parameters, all\) on cpu, 2 processes: "
        rf"step 0 to 3, 8 prompts a step; run folder {tmp_path}/run/?$"
    )
    assert len(re.findall(first, lines, re.MULTILINE)) == 1
    step = (
        r"^step 3/3, loss [-\d.e]+, reward [\d.]+, [\d,]+ tokens/s, [\d.]+ (s a step|steps/s), "
        r"\d\d:\d\d in all$"
    )
    assert len(re.findall(step, lines, re.MULTILINE)) == 1
    scores = r"^step 3, sums: score [\d.]+ \([\d.]+ to [\d.]+\), length [\d.]+, truncated [\d.]+%$"
    assert len(re.findall(scores, lines, re.MULTILINE)) == 1
    assert re.search(r"^step 3, worked: perplexity [\d.]+, KL", lines, re.MULTILINE)
    for noise in ("Loading weights", "it/s", "stopped", "srun", "TPU", "UserWarning"):
        assert noise not in lines


@pytest.mark.slow
@pytest.mark.vllm
def test_a_measurement_by_vllm_draws_nothing(in_lab: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "opd_lightning", "validate"),
        *("--config", str(CONFIGS / "lab" / "opd.yaml")),
        *("--config", str(CONFIGS / "engine" / "vllm.yaml")),
        "--data.sampling.max_new_tokens=8",
    ]
    lines, stdout = log_of(command, in_lab, tmp_path / "log")
    assert re.search(r"^evaluate 32/32 responses, .+ in all$", lines, re.MULTILINE)
    assert "it/s" not in lines
    assert not re.search(rb"[\r\x1b]", stdout)
