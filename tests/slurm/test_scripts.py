"""Refusals and restarts of the job scripts, on a real SLURM."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job
from tests.slurm.scripts import User

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

DDP = "configs/lab/opd.yaml configs/strategy/ddp.yaml"

# Script, options of sbatch, variables, part of the error line.
MISTAKES: list[tuple[str, tuple[str, ...], dict[str, str], str]] = [
    ("train", (), {}, "CONFIG: got none"),
    ("train", (), {"CONFIG": "configs/none.yaml"}, "CONFIG: no file 'configs/none.yaml'"),
    ("train", (), {"SETUP": "nowhere"}, "SETUP: no file 'nowhere'"),
    ("train", (), {"SETUP": "gone"}, "no 'opd' on the PATH"),
    ("train", (), {"GPUS_PER_NODE": ""}, "no GPUs in this job"),
    ("train", (), {"GPUS_PER_NODE": "4"}, "a node has 4 GPUs for 1 tasks"),
    ("train", ("--array=3",), {}, "RUN: got none; the runs of an array"),
    ("train", ("--chdir=/",), {}, "call sbatch in the repository, not in /"),
    ("serve", (), {}, "MODEL: got none"),
    ("train_with_servers", (), {}, "STUDENT: got none"),
    ("train_with_servers", (), {"ROLLOUT_SERVERS": "x"}, "ROLLOUT_SERVERS: got 'x'"),
    ("train_with_servers", (), {"ROLLOUT_GPUS": "2"}, "no room for server rollouts-0 of 2"),
    ("train_with_servers", (), {"TEACHER_SERVERS": "1"}, "no room for server teachers-0"),
    ("train_with_servers", (), {"SERVER_NODES": "1"}, "SERVER_NODES: got 1 of 1 nodes"),
    ("train_with_servers", ("--nodes=2",), {}, "SERVER_NODES: got 0 in a job of 2 nodes"),
]


@pytest.fixture(scope="module")
def user(cluster: Cluster, untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    return User(cluster, tmp_path_factory.mktemp("mistaken"), untrained_lab)


@pytest.fixture(scope="module")
def jobs(user: User) -> list[Job]:
    """Submit a job for each mistake."""
    (user.folder / "gone").write_text("PATH=/usr/bin:/bin\n")
    output = f"--output={user.folder}/%x-%j.log"
    jobs = []
    for script, sbatch, variables, told in MISTAKES:
        given = {} if told == "CONFIG: got none" else {"CONFIG": DDP}
        job = user.submit(f"{script}.sbatch", sbatch=(*sbatch, output), **given | variables)
        jobs.append(job)
    return jobs


@pytest.mark.parametrize("case", range(len(MISTAKES)), ids=[told for *_, told in MISTAKES])
def test_mistakes_are_told_in_one_line(case: int, user: User, jobs: list[Job]) -> None:
    job, told = jobs[case], MISTAKES[case][-1]
    assert job.wait(200) == "FAILED"
    assert job["ExitCode"] == "2:0"
    (line,) = user.log(job).splitlines()
    assert line.startswith("opd: error: ")
    assert told in line
    assert not list(user.folder.glob("servers/*"))


# In place of `opd`, whose start takes ten CPU seconds. On SIGUSR1 it does what `SlurmRequeue` does.
STAND_IN = """#!/bin/bash
echo "$*" >>starts
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
echo $$ >waits-0
while :; do sleep 0.1; done
"""


def test_a_job_that_is_signalled_starts_again_with_the_same_command(
    cluster: Cluster, untrained_lab: Path, tmp_path: Path
) -> None:
    """The runs themselves are in test_requeue.py."""
    user = User(cluster, tmp_path / "signalled", untrained_lab)
    program = tmp_path / "bin" / "opd"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    words = ("--trainer.max_steps", "3")
    job = user.submit("train.sbatch", *words, PATH=path, CONFIG="configs/lab/opd.yaml", RUN="run")
    user.await_pause()
    job.signal("USR1")
    assert job.wait() == "COMPLETED", user.log(job)
    assert job["Restarts"] == "1"
    first, second = (user.folder / "starts").read_text().splitlines()
    assert first == second
    started = first.split()
    assert {"callbacks.SlurmRequeue", "callbacks.RngState"} <= {w.split("+=")[-1] for w in started}
    pairs = {*pairwise(started)}
    last = ("--ckpt_path", "last")
    assert {last, ("--trainer.logger.init_args.save_dir", "run"), words} <= pairs
    told = [line for line in user.log(job).splitlines() if f"job {job.number}, nodes " in line]
    assert [line.split()[-1] for line in told] == ["0", "1"]
