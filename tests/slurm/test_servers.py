"""vLLM servers as jobs and beside a trainer, on a real SLURM."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, Job, until
from tests.slurm.scripts import PAUSE, SHORT, User

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

STUDENT = "lab/arithmetic/student"
LAB = {"CONFIG": "configs/lab/opd.yaml", "RUN": "run", "STUDENT": STUDENT, "DTYPE": "float32"}
SERVES = "bin/opd serve"
ASK = (
    "from opd_lightning.serving.client import Servers; "
    "servers = Servers(['servers/rollouts-1.address'], key_file='servers/key'); "
    "print(servers.get_all('/v1/models')[0])"
)


@pytest.fixture
def user(cluster: Cluster, tmp_path: Path, untrained_lab: Path) -> User:
    return User(cluster, tmp_path, untrained_lab)


def processes(cluster: Cluster) -> str:
    """Return the processes on the cluster's machines."""
    return cluster.run("ps", "-e", "-o", "pid=,args=")


def is_clean(cluster: Cluster) -> bool:
    return not re.search(rf"EngineCore|{SERVES}|opd fit|srun", processes(cluster))


def kill_server(cluster: Cluster) -> None:
    """Kill the server and its descendants, as when memory runs out."""
    doomed = [p.split()[0] for p in processes(cluster).splitlines() if re.search(SERVES, p)]
    doomed += [p.split()[0] for p in processes(cluster).splitlines() if "EngineCore" in p]
    cluster.run("kill", "-KILL", *doomed)


def start(user: User, job: Job) -> None:
    until(lambda: job["JobState"] == "RUNNING", "the job's start")
    until(lambda: SERVES in processes(user.cluster), "its servers")


def test_servers_of_a_job_serve_until_it_is_cancelled(user: User) -> None:
    options = ("--ntasks-per-node=2",)
    words = ("--max_length", "128")
    job = user.submit("serve.sbatch", *words, sbatch=options, MODEL=STUDENT, DTYPE="float32")
    start(user, job)
    job.signal("USR1")
    servers = user.folder / "servers"
    until(lambda: len(list(servers.glob("*.address"))) == 2, "their addresses", 400)
    job.signal("USR1")
    told = user.cluster.run("env", f"--chdir={user.folder}", sys.executable, "-c", ASK)
    assert "'max_model_len': 128" in told
    assert (servers / "key").stat().st_mode & 0o777 == 0o600
    user.cluster.run("scancel", job.number)
    assert job.wait(60) == "CANCELLED"
    until(lambda: is_clean(user.cluster), "the servers' end", 20)
    assert not list(servers.glob("*.address"))


def test_a_run_and_its_servers_are_requeued_together(user: User) -> None:
    options = ("--nodes=2", "--ntasks-per-node=1")
    words = (*SHORT, "--trainer.max_steps", "6", PAUSE)
    job = user.submit("train_with_servers.sbatch", *words, sbatch=options, SERVER_NODES="1", **LAB)
    start(user, job)
    job.signal("USR1")  # before there is a trainer: servers ignore it
    user.await_pause(500)
    (first,) = user.folder.glob("servers/*")
    key = (first / "key").read_text().strip()
    assert (first / "key").stat().st_mode & 0o777 == 0o600
    assert key not in processes(user.cluster)
    job.signal("USR1")
    assert job.wait(800) == "COMPLETED", user.log(job)
    assert job["Restarts"] == "1"
    for text in (user.log(job), user.log(job, "rollouts-0")):
        assert key not in text
    assert user.log(job).count("opd: server rollouts-0 answers at http://10.77.0.2:") == 2
    assert re.search("SIGUSR1: .* step 4 as ", user.log(job))
    last = torch.load(user.folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    until(lambda: is_clean(user.cluster), "the servers' end", 20)
    assert not list(user.folder.glob("servers/*"))


def test_a_server_that_dies_ends_the_run_and_the_other_servers(user: User) -> None:
    words = (*SHORT, "--trainer.max_steps", "100000", PAUSE)
    job = user.submit(
        "train_with_servers.sbatch",
        *words,
        sbatch=("--ntasks-per-node=3",),
        TEACHER_SERVERS="1",
        TEACHER="lab/arithmetic/teacher",
        TEACHER_DTYPE="float32",
        SAVE_SECONDS="5",
        **LAB,
    )
    user.await_pause(500)
    kill_server(user.cluster)
    assert job.wait(120) == "FAILED"
    (line,) = user.errors(job)
    assert re.search(r"server \w+-0 has ended; the end of opd-train-\d+-\w+-0\.log: ", line)
    until(lambda: is_clean(user.cluster), "the others' end", 20)
    assert not list(user.folder.glob("servers/*"))


def test_a_server_that_does_not_start_ends_the_job(user: User) -> None:
    job = user.submit("train_with_servers.sbatch", sbatch=(), **LAB | {"STUDENT": "nowhere"})
    assert job.wait(200) == "FAILED"
    (line,) = user.errors(job)
    assert "server rollouts-0 has ended" in line
    assert "model 'nowhere': " in line
    assert is_clean(user.cluster)
    assert not list(user.folder.glob("servers/*"))
