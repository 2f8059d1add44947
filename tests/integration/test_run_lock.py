"""A run folder is locked by one job at a time, until the job ends."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.cli import main
from opd_lightning.errors import UserError
from opd_lightning.run.lock import LOCK, held
from tests.integration.test_fit import CONFIG
from tests.integration.test_interrupted import FAST
from tests.integration.test_offline import write

# Holds the folder or file, with a forked child beside it, until it is ended.
HOLDER = """
import os, sys, time
from pathlib import Path
from opd_lightning.run import lock as run_lock
with getattr(run_lock, sys.argv[3])(Path(sys.argv[1])):
    if os.fork() == 0:
        os.write(1, b"x")
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_job(
    place: Path, seconds: float = 60, hold: str = "held", **environment: str
) -> Iterator[Any]:
    """A process that holds `place`, by the function of that name."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place), str(seconds), hold],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fit(folder: Path, *changes: str) -> None:
    main(["fit", "--config", CONFIG, f"--trainer.logger.init_args.save_dir={folder}", *changes])


@pytest.mark.usefixtures("in_lab")
def test_the_second_job_is_refused_before_it_does_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with another_job(run, SLURM_JOB_ID="17") as process:
        with pytest.raises(SystemExit) as exit_:
            fit(run, *FAST)
        assert exit_.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error")]
        who = f"process {process.pid} on {socket.gethostname()}, SLURM job 17, since "
        assert line.startswith(f"opd: error: run folder {str(run)!r} is in use by {who}")
        assert os.listdir(run) == [LOCK]


def test_a_killed_job_lets_go_at_once(tmp_path: Path) -> None:
    """Even though a process that it forked lives on."""
    with another_job(tmp_path) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on"), held(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with held(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_requeued_job_waits_for_its_earlier_self(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with another_job(tmp_path, seconds=1), held(tmp_path, patience=60):
        assert "opd: waiting up to 60 s for process" in capsys.readouterr().err
    with (
        another_job(tmp_path),
        pytest.raises(UserError, match="SLURM job 17, since"),
        held(tmp_path, patience=0.1),
    ):
        pass
    began = time.monotonic()
    with another_job(tmp_path, SLURM_JOB_ID="18"), pytest.raises(UserError), held(tmp_path):
        pass
    assert time.monotonic() - began < 60


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: run folder")
    assert "files cannot be locked there (Function not implemented)" in line


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name one that can be written to"), held(tmp_path / "file"):
        pass


@pytest.mark.usefixtures("in_lab")
def test_a_finished_run_lets_go(tmp_path: Path) -> None:
    fit(tmp_path, *FAST, "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    with held(tmp_path):
        pass


@pytest.mark.usefixtures("in_lab")
def test_two_jobs_do_not_write_responses_to_one_file(tmp_path: Path) -> None:
    out, others = tmp_path / "responses.jsonl", tmp_path / "others.jsonl"
    with another_job(out, hold="held_file") as process:
        refusal = f"--out: {str(out)!r} is in use by process {process.pid}"
        with pytest.raises(UserError, match=re.escape(refusal)):
            write(out, limit=2)
        assert not out.exists()
        write(others, limit=2)
    write(out, limit=2)
    assert out.read_text() == others.read_text()
    with pytest.raises(UserError, match="expected a file"):
        write(tmp_path)
