"""Requeued jobs on a real SLURM: the run equals an uninterrupted one.

Two real starts take 40 CPU seconds, so all are slow: quicker are the job's part in test_scripts.py,
the callback's in tests/unit/test_callback_slurm_requeue.py and the run's in test_signalled.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, until
from tests.slurm.runs import LAST, ONE, assert_alike, nodes_of, run_here, submit
from tests.slurm.scripts import User

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

NewUser = Callable[[str], User]

VLLM = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture
def new_user(cluster: Cluster, tmp_path: Path, untrained_lab: Path) -> NewUser:
    """Return a function that makes a user with a folder of a name."""
    return lambda name: User(cluster, tmp_path / name, untrained_lab)


def finish(user: User, job: Job, *, restarts: int) -> None:
    assert job.wait() == "COMPLETED", user.log(job)
    assert job["Restarts"] == str(restarts)


ENGINES = pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        (ONE, "HFEngine"),
        ("ddp", "HFEngine"),
        ("fsdp2", "HFEngine"),
        pytest.param("ddp", "VLLMEngine", marks=VLLM),
        pytest.param("fsdp2", "VLLMEngine", marks=VLLM),
    ],
)


def submit_paused(user: User, strategy: str, engine: str, *, seconds: float) -> Job:
    """Submit a run and return when all ranks wait in their fourth step."""
    pause = {"hook": "on_after_backward", "step": 3, "seconds": seconds}
    job = submit(user, strategy, engine=engine, pause=pause)
    user.await_pause(ranks=nodes_of(strategy))
    return job


@ENGINES
def test_a_job_that_is_signalled_ends_like_a_run_without_slurm(
    new_user: NewUser, strategy: str, engine: str
) -> None:
    alone, asked = new_user("alone"), new_user("asked")
    job = submit_paused(asked, strategy, engine, seconds=5)
    job.signal("USR1")
    run_here(alone, strategy, engine=engine)
    finish(asked, job, restarts=1)

    said = f"opd: SIGUSR1: saved the beginning of step 4 as {LAST}; job {job.number} is requeued"
    assert asked.log(job).count(said) == 1, asked.log(job)
    for restart in (0, 1):
        nodes = "n1" if strategy == ONE else "n[1-2]"
        told = f"job {job.number}, nodes {nodes} with 1 tasks each, run folder run, restart"
        assert asked.log(job).count(f"opd: {told} {restart}\n") == 1
    assert_alike(asked, alone)


@ENGINES
def test_a_job_whose_node_breaks_ends_like_a_run_without_slurm(
    cluster: Cluster, new_user: NewUser, strategy: str, engine: str
) -> None:
    """The job is killed at once and resumes from the checkpoint of step 2."""
    alone, killed = new_user("alone"), new_user("killed")
    job = submit_paused(killed, strategy, engine, seconds=1200)
    cluster.break_node(f"n{nodes_of(strategy)}")
    run_here(alone, strategy, engine=engine)
    finish(killed, job, restarts=1)
    assert "SIGUSR1" not in killed.log(job)
    assert_alike(killed, alone)


def test_term_to_one_rank_saves_and_stops_all(cluster: Cluster, new_user: NewUser) -> None:
    """The signal comes during a validation, which is interrupted."""
    user = new_user("term")
    pause = {"hook": "on_validation_batch_start", "step": 2, "seconds": 5}
    job = submit(user, "ddp", pause=pause)
    cluster.run("kill", "-TERM", user.await_pause(ranks=2)[1])
    assert job.wait() == "FAILED", user.log(job)
    assert job["ExitCode"] == "143:0"
    assert job["Restarts"] == "0"
    assert user.log(job).count(f"opd: SIGTERM: saved the beginning of step 2 as {LAST}") == 1
    assert (user.folder / LAST).exists()


def test_a_signal_before_the_first_step_is_not_forgotten(
    cluster: Cluster, new_user: NewUser
) -> None:
    user = new_user("early")
    job = submit(user, "ddp", pause={"hook": "setup", "step": 0, "seconds": 5})
    user.await_pause(ranks=2)
    job.signal("USR1")
    until(lambda: job["Restarts"] == "1", "the requeue")
    assert "opd: SIGUSR1: no step was made since the start" in user.log(job)
    assert not (user.folder / LAST).exists()
    cluster.run("scancel", job.number)


@pytest.mark.timeout(1800)
def test_a_time_limit_is_a_requeue(new_user: NewUser) -> None:
    """SLURM sends the signal earlier than set, so a slow start may make no step."""
    alone, limited = new_user("alone"), new_user("limited")
    first = submit(alone, "ddp")
    finish(alone, first, restarts=0)
    limits = ("--time=1", "--signal=USR1@10")
    pause = {"hook": "on_after_backward", "step": 3, "seconds": 20}
    job = submit(limited, "ddp", *limits, pause=pause)
    assert job.wait(1200) == "COMPLETED", limited.log(job)
    assert int(job["Restarts"]) >= 1
    assert "opd: SIGUSR1: saved the beginning of step" in limited.log(job)
    assert_alike(limited, alone)
