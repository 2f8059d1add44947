"""A run folder that an earlier version wrote goes on with this one.

`tests/saved_run/run` was written at 0.1.0, before modules moved to packages: two of four steps of
G-OPD with an EMA reference, a policy gradient corrected for the sampler and a validation.
`at_step_4.json` is what that version made of it two steps later. Do not write either anew: a
checkpoint that can no longer be loaded is a breaking change.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main

SAVED = Path(__file__).parents[1] / "saved_run"


def test_an_old_run_goes_on(
    deep_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "run", "run")
    for name in ("lab", "configs"):
        Path(name).symlink_to(deep_lab / name)
    main(["fit", "--config", "run/config.yaml", "--trainer.max_steps=4", "--ckpt_path=last"])

    expected: dict[str, Any] = json.loads((SAVED / "at_step_4.json").read_text())
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert sorted(checkpoint) == expected["checkpoint_keys"]
    assert sorted(checkpoint["callbacks"]) == expected["callbacks"]
    norms = {k: float(v.double().norm()) for k, v in checkpoint["state_dict"].items()}
    assert norms == pytest.approx(expected["state_dict"], rel=1e-4)
    log = EventAccumulator("run").Reload()
    losses = {str(e.step): e.value for e in log.Scalars("loss")}
    assert losses == pytest.approx(expected["loss"], abs=2e-5)
    assert [e.step for e in log.Scalars("val/sums/score")] == [2, 4]
