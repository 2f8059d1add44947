"""On a real SLURM of two nodes: what a job goes through leaves no trace in its run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import LAST, assert_alike, log, submit, wait_for_pause

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@cache
def unbroken(cluster: Cluster, runs: Path, lab: Path, strategy: str) -> Path:
    """The run that nothing happens to."""
    folder = runs / f"unbroken-{strategy}"
    job = submit(cluster, folder, lab, strategy)
    assert job.wait() == "COMPLETED", log(folder)
    assert job["Restarts"] == "0"
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_usr1_requeues_a_run_that_ends_like_one_left_alone(
    cluster: Cluster, runs: Path, untrained_lab: Path, strategy: str
) -> None:
    folder = runs / f"requeued-{strategy}"
    pause = {"hook": "on_after_backward", "step": 3, "seconds": 2}
    job = submit(cluster, folder, untrained_lab, strategy, pause=pause)
    wait_for_pause(folder)
    job.signal("USR1")
    assert job.wait() == "COMPLETED", log(folder)
    assert job["Restarts"] == "1"
    said = f"opd: SIGUSR1: saved the beginning of step 4 as {LAST}; job {job.number} is requeued"
    assert log(folder).count(said) == 1, log(folder)
    assert_alike(folder, unbroken(cluster, runs, untrained_lab, strategy))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_node_that_goes_down_costs_steps_and_nothing_else(
    cluster: Cluster, runs: Path, untrained_lab: Path, strategy: str
) -> None:
    """Its job is killed at once, and goes on from the checkpoint of step 2."""
    folder = runs / f"down-{strategy}"
    pause = {"hook": "on_after_backward", "step": 3, "seconds": 600}
    job = submit(cluster, folder, untrained_lab, strategy, pause=pause)
    wait_for_pause(folder)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    assert job.wait() == "COMPLETED", log(folder)
    assert job["Restarts"] == "1"
    assert "opd: " not in log(folder)
    assert_alike(folder, unbroken(cluster, runs, untrained_lab, strategy))


def test_term_to_one_rank_saves_and_stops_all(
    cluster: Cluster, runs: Path, untrained_lab: Path
) -> None:
    """During a validation, which is not waited for."""
    folder = runs / "term"
    pause = {"hook": "on_validation_batch_start", "step": 2, "seconds": 2}
    job = submit(cluster, folder, untrained_lab, "ddp", pause=pause)
    cluster.run("kill", "-TERM", wait_for_pause(folder)[1])
    assert job.wait() == "FAILED", log(folder)
    assert job["ExitCode"] == "143:0"
    assert job["Restarts"] == "0"
    assert log(folder).count(f"opd: SIGTERM: saved the beginning of step 2 as {LAST}") == 1
    assert (folder / LAST).exists()


def test_a_signal_before_the_first_step_is_not_forgotten(
    cluster: Cluster, runs: Path, untrained_lab: Path
) -> None:
    folder = runs / "early"
    pause = {"hook": "setup", "step": 0, "seconds": 2}
    job = submit(cluster, folder, untrained_lab, "ddp", pause=pause)
    wait_for_pause(folder)
    job.signal("USR1")
    until(lambda: job["Restarts"] == "1", "the requeue")
    assert "opd: SIGUSR1: no step was made since the start" in log(folder)
    assert not (folder / LAST).exists()
    cluster.run("scancel", job.number)


@pytest.mark.slow
def test_a_time_limit_is_a_requeue(cluster: Cluster, runs: Path, untrained_lab: Path) -> None:
    """SLURM may send the signal up to a minute early, so a start may come to nothing."""
    folder = runs / "limited"
    limits = ("--time=1", "--signal=USR1@30")
    pause = {"hook": "on_after_backward", "step": 3, "seconds": 20}
    job = submit(cluster, folder, untrained_lab, "ddp", *limits, pause=pause)
    assert job.wait(1200) == "COMPLETED", log(folder)
    assert int(job["Restarts"]) >= 1
    assert "opd: SIGUSR1: saved the beginning of step" in log(folder)
    assert_alike(folder, unbroken(cluster, runs, untrained_lab, "ddp"))


@pytest.mark.slow
@pytest.mark.vllm
def test_usr1_with_vllm_in_every_rank(cluster: Cluster, runs: Path, untrained_lab: Path) -> None:
    whole, folder = runs / "vllm-unbroken", runs / "vllm"
    assert submit(cluster, whole, untrained_lab, "ddp", engine="VLLMEngine").wait() == "COMPLETED"
    pause = {"hook": "on_after_backward", "step": 3, "seconds": 2}
    job = submit(cluster, folder, untrained_lab, "ddp", pause=pause, engine="VLLMEngine")
    wait_for_pause(folder)
    job.signal("USR1")
    assert job.wait() == "COMPLETED", log(folder)
    assert job["Restarts"] == "1"
    assert_alike(folder, whole)
