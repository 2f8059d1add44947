"""A run resumed from any checkpoint that it saved writes the same checkpoint and the same log."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from opd_lightning.cli import main
from tests.comparing import compare, scalars, state, tensors
from tests.full_run import CONFIG, RUN, settings

STEPS = 10  # an epoch is eight; validation follows steps 5 and 10
SG_OPD = CONFIG.with_name("sg_opd.yaml")
VLLM = {"class_path": "opd_lightning.rollouts.VLLMEngine"}
PHASES: dict[str, Any] = {
    "callbacks": ["callbacks.PhasedTeacherSampling"],
    "data__mix": {"teacher": 0.5, "only_correct": False},
    "data__samples_per_prompt": 2,
}

# How runs differ from the settings, which have an EMA teacher, a one-cycle schedule, early
# stopping, and checkpoints of best loss and best score; and which checkpoints are tried.
WAYS = [
    pytest.param(CONFIG, {}, slice(None), id="plain"),
    pytest.param(CONFIG, {"data__max_staleness": 1}, slice(3, 6, 2), id="stale"),
    pytest.param(SG_OPD, PHASES, slice(3, 6, 2), id="phases"),
    pytest.param(CONFIG, {"data__engine": VLLM}, slice(3, 6, 2), id="vllm", marks=pytest.mark.vllm),
]


def fit(config: Path, *more: str) -> None:
    """In the current folder."""
    main(["fit", "--config", str(config), "--config", "settings.yaml", *more])


@pytest.mark.slow  # test_killed.py compares a run that goes on from its last checkpoint
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "changes", "tried"), WAYS)
def test_a_run_goes_on_bit_for_bit_from_any_checkpoint(
    config: Path,
    changes: dict[str, Any],
    tried: slice,
    deep_lab: Path,  # of which step 5 is the best
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tmp_path / "whole"
    settings(whole, steps=STEPS, every=1, keep=-1, **changes)
    (whole / "lab").symlink_to(deep_lab / "lab")
    monkeypatch.chdir(whole)
    fit(config)
    assert [step for step, _ in scalars(RUN)["val/sums/length"]] == [5, 10]
    assert [step for step, _ in tensors(RUN)["rollouts/text_summary"]] == [0, 3, 6, 9]
    # One a step, and the best; from the last step on there is nothing to do.
    saved = sorted(path.name for path in (RUN / "checkpoints").glob("*step=[1-9].ckpt"))
    assert {"best-step=5.ckpt", "epoch=0-step=5.ckpt", "epoch=1-step=9.ckpt"} < {*saved}
    assert len(saved) == STEPS
    for name in saved[tried]:
        resumed = tmp_path / name
        copytree(whole, resumed, symlinks=True)
        monkeypatch.chdir(resumed)
        start = RUN / "checkpoints" / name
        for path in start.parent.iterdir():  # as it was when the checkpoint had been saved
            if path.stat().st_mtime > start.stat().st_mtime:
                path.unlink()
        fit(config, "--ckpt_path", str(start))
        assert "\n".join(compare(resumed, whole)) == "", name


def test_a_kill_between_two_savers_loses_no_save(
    untrained_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both save after the validation of step 5; the resumed run does what the second had to do."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings(whole, steps=8, callbacks=["tests.full_run.Snapshot"])
    (whole / "lab").symlink_to(untrained_lab / "lab")
    monkeypatch.chdir(whole)
    fit(CONFIG)
    last, best = (Path(RUN, "checkpoints", name) for name in ("last.ckpt", "best-step=5.ckpt"))
    assert state(killed / last)["global_step"] == 5
    assert not (killed / best).exists()
    monkeypatch.chdir(killed)
    fit(CONFIG, "--ckpt_path", "last")
    assert (killed / best).exists()
    assert "\n".join(compare(killed, whole)) == ""
    # The last step of an epoch, whose save Lightning defers to a validation that does not come.
    assert state(whole / last)["global_step"] == 8
