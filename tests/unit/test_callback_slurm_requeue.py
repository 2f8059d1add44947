"""Requeue requests of jobs, and refusals by SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.slurm_requeue import _leave
from opd_lightning.run.signals import SignalAction, SignalledError


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on the PATH with a fake `scontrol` that records its arguments."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return tmp_path


def left(action: SignalAction, *, is_first: bool = True) -> int:
    with pytest.raises(SignalledError) as end:
        _leave(action, "saved it", is_first)
    return end.value.code


def test_a_job_is_requeued(scontrol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left(SignalAction.REQUEUE) == 0
    assert (scontrol / "told").read_text() == "requeue 12\n"
    assert capsys.readouterr().err == "opd: SIGUSR1: saved it; job 12 is requeued\n"


def test_a_task_of_an_array_is_requeued_alone(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert left(SignalAction.REQUEUE) == 0
    assert (scontrol / "told").read_text() == "requeue 10_2\n"


def test_one_rank_asks_and_speaks(scontrol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left(SignalAction.REQUEUE, is_first=False) == 0
    assert not (scontrol / "told").exists()
    assert capsys.readouterr().err == ""


def test_slurm_may_end_scontrol_with_the_job(
    scontrol: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scontrol / "scontrol").write_text("#!/bin/sh\nkill -TERM $$\n")
    assert left(SignalAction.REQUEUE) == 0
    assert capsys.readouterr().err == "opd: SIGUSR1: saved it; job 12 is requeued\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [("#!/bin/sh\necho 'Access denied' >&2; exit 1\n", "Access denied"), (None, "No such file")],
)
def test_a_refusal_is_an_error(
    script: str | None, reason: str, scontrol: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scontrol / "scontrol").unlink()
    if script:
        (scontrol / "scontrol").write_text(script)
        (scontrol / "scontrol").chmod(0o755)
    assert left(SignalAction.REQUEUE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: error: job 12 could not be requeued")
    assert reason in line
    assert line.endswith("saved it; submit it again")


def test_term_requeues_nothing(scontrol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert left(SignalAction.STOP) == 143
    assert not (scontrol / "told").exists()
    assert capsys.readouterr().err == "opd: SIGTERM: saved it; resume with --ckpt_path last\n"


def test_usr1_outside_of_slurm_is_a_stop(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert left(SignalAction.REQUEUE) == 138
    assert capsys.readouterr().err == "opd: SIGUSR1: saved it; resume with --ckpt_path last\n"
