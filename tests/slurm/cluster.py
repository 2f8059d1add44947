"""Real SLURM cluster of several nodes for tests, and its jobs; started by cluster.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip")
NETWORK = "hostname n1; ip link add switch type bridge; ip link add port type veth peer name card"
# Final states of a job; a requeued one is PENDING again.
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def unavailable() -> str | None:
    """Return the reason why SLURM cannot be started here; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs a SLURM of its own, and {', '.join(absent)} is not installed"
    if os.geteuid() != 0:
        return "needs a SLURM of its own, and only root can start one"
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-ec", NETWORK]
    alone = subprocess.run(command, capture_output=True, text=True)
    return f"needs machines of its own: {alone.stderr.strip()}" if alone.returncode else None


def until(condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
    """Wait for a condition, or fail with its name `what`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)


class Cluster:
    """Cluster of nodes n1, n2, ... that ends with `close` or with this process.

    Args:
        folder: Absolute folder for the cluster's files.
        nodes: Number of nodes.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        # cluster.sh ends at the end of its stdin.
        command = [str(SCRIPT), str(folder), str(nodes), "sh", "-c", 'touch "$0"; exec cat']
        ready = folder / "ready"
        self._process = subprocess.Popen([*command, str(ready)], stdin=subprocess.PIPE)
        until(lambda: ready.exists() or self._process.poll() is not None, "the cluster's start")
        assert self._process.poll() is None, "the cluster did not start"
        machine = (folder / "pid").read_text().strip()
        self._enter = [
            "nsenter",
            "--all",
            "--target",
            machine,
            "env",
            f"SLURM_CONF={folder}/slurm.conf",
        ]

    def run(self, *command: str) -> str:
        """Run a command on the controller's machine and return its output."""
        done = subprocess.run(
            [*self._enter, *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> Job:
        """Submit a batch script, run in its folder; jobs import this checkout first."""
        environment = (
            f"PYTHONPATH={ROOT}",
            f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        command = ("env", *environment, "sbatch", "--parsable", f"--chdir={script.parent}")
        return Job(self, self.run(*command, *options, str(script)))

    def break_node(self, name: str) -> None:
        """Make a node fail and return."""
        update = ("scontrol", "update", f"nodename={name}")
        self.run(*update, "state=down", "reason=test")
        # SLURM refuses if the node's daemon has already reported again.
        subprocess.run([*self._enter, *update, "state=resume"], capture_output=True, check=False)
        show = ("sinfo", "--noheader", f"--nodes={name}", "--format=%T")
        until(lambda: "down" not in self.run(*show), f"{name} is back")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Job:
    """Batch job on a test cluster."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster = cluster
        self.number = number

    def __getitem__(self, field: str) -> str:
        """Return a field of `scontrol show job`, such as JobState, Restarts or ExitCode."""
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        found = re.search(rf"\b{field}=(\S*)", shown)
        assert found, f"job {self.number} has no {field}"
        return found[1]

    def signal(self, name: str) -> None:
        """Send a signal to all processes of its steps, as SLURM does before the time limit."""
        self.cluster.run("scancel", f"--signal={name}", self.number)

    def wait(self, seconds: float = 400) -> str:
        """Wait for the end of the job, requeues included; return its state."""
        until(lambda: self["JobState"] in ENDS, f"the end of job {self.number}", seconds)
        return self["JobState"]
