"""What the documentation says is run, word for word."""

import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_page_s_method_is_short() -> None:
    assert len(block("python").splitlines()) < 60


@pytest.mark.parametrize("teacher", ["teacher", "student"])
def test_the_page_s_method_trains(
    teacher: str, in_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").symlink_to(in_lab / "lab")
    (tmp_path / "power_opd.py").write_text(block("python"))
    (tmp_path / "power_opd.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    steps = 2
    main(
        [
            "fit",
            *("--config", str(ROOT / "configs" / "lab" / "opd.yaml")),
            *("--config", "power_opd.yaml"),
            f"--model.init_args.teacher.init_args.path=lab/arithmetic/{teacher}",
            f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}",
            f"--trainer.max_steps={steps}",
            "--data.prompts_per_step=8",
            "--data.sampling.max_new_tokens=8",
            "--trainer.enable_progress_bar=false",
        ]
    )
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    norms = [event.value for event in events.Scalars("optim/gradient_norm")]
    assert len(norms) == steps
    # Its own teacher teaches nothing: the first test that the page asks for.
    assert (norms[0] > 1e-4) if teacher == "teacher" else (norms[0] < 1e-6)
    assert 0 <= events.Scalars("rule/skip_sure/kept")[0].value <= 1
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
