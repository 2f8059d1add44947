"""Experts of the skills lab and what they are merged to, over seeds: the table of docs/merging.md.

Every seed trains both experts, and merges them by MOPD and by ExOPD, with the configurations of
configs/lab. All are measured on the lab's test problems. Runs that exist are read, not repeated.

Run: python benchmarks/merging.py [--seeds 0 1 2] [--work runs/merging]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path
from statistics import mean, stdev

from opd_lightning.cli import main as opd
from opd_lightning.lab.build import SkillsRecipe, build

ROOT = Path(__file__).parents[1]
DOMAINS = ("add-3", "program-2")
EXPERTS = {"expert, sums": "lab-experts-sums", "expert, programs": "lab-experts-programs"}
MERGED = {"MOPD": "lab-mopd", "ExOPD": "lab-exopd-merge"}


def train(run: str, seed: int) -> None:
    """Run `opd fit` unless the run's student exists, and export it; write its CPU seconds."""
    folder = Path("runs", run)
    if (folder / "student").exists():
        return
    began = cpu_seconds()
    name = run.removeprefix("lab-").replace("-", "_")
    quiet = "--trainer.enable_progress_bar=false"
    opd(["fit", "--config", f"configs/lab/{name}.yaml", f"--seed_everything={seed}", quiet])
    (folder / "cpu_seconds").write_text(str(cpu_seconds() - began))
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    config = str(folder / "config.yaml")
    opd(["export", "--config", config, "--ckpt_path", checkpoint, "--out", str(folder / "student")])


def cpu_seconds() -> float:
    """Return the CPU time of this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(student: str, name: str) -> dict[str, float]:
    """Return the score by domain on the test problems."""
    out = Path(f"{name}.json")
    if not out.exists():
        model = ["--model.student.path", student]
        opd(["test", "--config", "configs/lab/mopd.yaml", *model, "--out", str(out)])
    domains = json.loads(out.read_text())["suites"]["skills"]["domains"]
    return {domain: domains[domain]["score"] for domain in DOMAINS}


def run_seed(seed: int, work: Path) -> dict[str, dict[str, float]]:
    """Return the scores of all students of a seed, by name and domain."""
    folder = work / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    build(SkillsRecipe(), Path("lab/skills"))
    if not Path("configs").exists():
        Path("configs").symlink_to(ROOT / "configs")
    for run in (*EXPERTS.values(), *MERGED.values()):
        train(run, seed)
    students = {"start": "lab/skills/start"}
    students |= {name: f"runs/{run}/student" for name, run in (EXPERTS | MERGED).items()}
    return {name: measure(path, name) for name, path in students.items()}


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: mean, standard deviation and the seeds by domain."""
    rows = ["| student | " + " | ".join(DOMAINS) + " |", "|---" * (1 + len(DOMAINS)) + "|"]
    for name in seeds[0]:
        cells = []
        for domain in DOMAINS:
            values = [scores[name][domain] for scores in seeds]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{mean(values):.3f}{spread} ({each})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/merging"))
    options = parser.parse_args()
    work = options.work.resolve()
    print(table([run_seed(seed, work) for seed in options.seeds]))
    for run in (*EXPERTS.values(), *MERGED.values()):
        used = [float((work / str(s) / "runs" / run / "cpu_seconds").read_text())
                for s in options.seeds]  # fmt: skip
        print(f"{run}: {mean(used) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
