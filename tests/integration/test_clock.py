"""The wall clock may jump by days: nothing that lasts, waits or chooses goes by it."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from opd_lightning.cli import main
from tests.integration.test_fit import CONFIG
from tests.integration.test_interrupted import FAST, scalars

DAY = 86400.0
ROOT = Path(__file__).parents[2]


class Clock(Callback):
    """Sets the wall clock after given steps: three days back, then six days on."""

    offset = 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        jumps = {1: -3 * DAY, 3: 6 * DAY}
        if trainer.global_step in jumps:
            Clock.offset = jumps[trainer.global_step]


def run(folder: Path, *changes: str) -> dict[str, Tensor]:
    """The student's weights at the end."""
    options = [f"--trainer.logger.init_args.save_dir={folder}", *FAST, "--trainer.max_steps=4"]
    options += ["--data.validation=null", f"--trainer.callbacks+={__name__}.Clock", *changes]
    main(["fit", "--config", CONFIG, *options])
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, Tensor] = saved["state_dict"]
    return weights


@pytest.mark.slow
@pytest.mark.usefixtures("in_lab")
def test_a_run_does_not_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "even")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + Clock.offset)
    monkeypatch.setattr(Clock, "offset", 0.0)
    folder = tmp_path / "jumps"
    run(folder, "--trainer.max_steps=2")  # it ends three days before it began
    last = folder / "checkpoints" / "last.ckpt"
    torch.testing.assert_close(run(folder, f"--ckpt_path={last}"), expected, atol=0, rtol=0)
    # All is logged, though TensorBoard takes files in the order of the clock times in their names.
    even, logged = scalars(tmp_path / "even"), scalars(folder)
    assert sorted(logged["loss"]) == even["loss"]


def test_nothing_of_ours_measures_with_the_wall_clock() -> None:
    """It may be shown, as when a lock was taken; `time.time` alone is for measuring.

    Times of files choose between checkpoints of the same step, which are alike, and nowhere else.
    """
    files = [
        p for package in ("opd_lightning", "callbacks") for p in (ROOT / package).rglob("*.py")
    ]
    assert files
    measures = re.compile(r"\btime\.time\(|from time import .*\btime\b|st_mtime")
    found = [str(p.relative_to(ROOT)) for p in files if measures.search(p.read_text())]
    assert found == ["opd_lightning/checkpoints/reading.py"]
