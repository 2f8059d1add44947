"""Submission of the scripts in slurm/ from a user's folder with a lab."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.slurm.cluster import ROOT, Cluster, Job, until

# A short run of `configs/lab/opd.yaml` on the untrained lab.
SHORT = (
    *("--data.prompts_per_step", "8"),
    *("--data.sampling.max_new_tokens", "8"),
    *("--data.validation", "null"),
    *("--model.init_args.lr_scheduler", "null"),
    *("--trainer.enable_progress_bar", "false"),
)
# In its fourth step.
PAUSE = (
    '--trainer.callbacks+={"class_path":"tests.slurm.parts.Pause",'
    '"init_args":{"hook":"on_after_backward","step":3,"seconds":10}}'
)


class User:
    """User with a checkout and a lab.

    Args:
        folder: Folder of submission; created.
        lab: The untrained lab.
    """

    def __init__(self, cluster: Cluster, folder: Path, lab: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("slurm", ROOT), ("configs", ROOT), ("lab", lab)):
            (folder / name).symlink_to(target / name)
        self.cluster = cluster
        self.folder = folder

    def submit(
        self, script: str, *words: str, sbatch: tuple[str, ...] = (), **variables: str
    ) -> Job:
        """Run `VARIABLE=value sbatch OPTIONS slurm/SCRIPT WORDS`, without GPUs."""
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GPUS_PER_NODE": "0",
        } | variables
        command = ["env", *(f"{name}={value}" for name, value in environment.items())]
        command += ["sbatch", "--parsable", f"--chdir={self.folder}", *sbatch]
        return Job(self.cluster, self.cluster.run(*command, str(ROOT / "slurm" / script), *words))

    def log(self, job: Job, name: str | None = None) -> str:
        """Return the log of a job or of one of its servers."""
        (file,) = self.folder.glob(f"*-{job.number}-{name}.log" if name else f"*-{job.number}.log")
        return file.read_text()

    def await_pause(self, seconds: float = 300, *, ranks: int = 1) -> list[str]:
        """Wait for all ranks to reach their `Pause`; return process ids by rank."""
        files = [self.folder / f"waits-{rank}" for rank in range(ranks)]
        until(lambda: all(f.exists() and f.read_text() for f in files), "the pause", seconds)
        return [file.read_text() for file in files]

    def errors(self, job: Job) -> list[str]:
        return [line for line in self.log(job).splitlines() if line.startswith("opd: error:")]
