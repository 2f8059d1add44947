"""Whether CollapseWatch notices runs that collapse on the lab, and leaves honest ones alone.

Honest runs are a shipped configuration over several seeds. The others are shipped configurations
with one thing made wrong; the watch may step back. All is read from the
run's TensorBoard files.

Run: opd lab build; python benchmarks/collapse.py [honest | repetition | rate | scale ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.types import Prompt
from opd_lightning.verifiers import Verifier

OPD = [sys.executable, "-m", "opd_lightning"]
HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "lab"
FIGURES = ("reward", "response/truncated", "response/length", "entropy/student")

# What is made wrong: a configuration and changes to it.
WRONG: dict[str, tuple[str, list[str]]] = {
    "repetition": ("grpo", ["--data.verifier=collapse.PaysRepetition"]),
    "rate": (
        "opd",
        [
            "--model.init_args.optimizer.init_args.lr=1e-3",
            "--model.init_args.lr_scheduler=torch.optim.lr_scheduler.MultiStepLR",
            "--model.init_args.lr_scheduler.init_args.milestones=[20]",
            "--model.init_args.lr_scheduler.init_args.gamma=30",
        ],
    ),
    "scale": ("g_opd", ["--model.init_args.scale=20"]),
}


class PaysRepetition(Verifier):
    """A reward that somebody got wrong: the share of characters that repeat the one before."""

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [sum(a == b for a, b in pairwise(r)) / 64 for r in responses]


def fit(config: str, run: Path, responses: int, *changes: str) -> list[str]:
    """Train with so many responses a step; what the watch said."""
    samples = 8 if config == "grpo" else 1
    command = [*OPD, "fit", "--config", str(CONFIGS / f"{config}.yaml")]
    command += ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1000"]
    command += [f"--trainer.logger.init_args.save_dir={run}"]
    command += [f"--data.prompts_per_step={responses // samples}", *changes]
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("opd: ")]
    if done.returncode and not any("out of its band" in line for line in said):
        sys.exit(done.stderr)
    return said


def figures(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    names = [*FIGURES, "collapse/out_of_band", "collapse/step_backs"]
    kept = [name for name in names if name in events.Tags()["scalars"]]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in kept}


def honest(config: str, seed: int, responses: int, runs: Path) -> dict[str, Any]:
    run = runs / f"{config}-{seed}"
    said = fit(config, run, responses, f"--seed_everything={seed}")
    logged = figures(run)
    extremes = {name: (min(logged[name].values()), max(logged[name].values())) for name in FIGURES}
    outside = sum(logged["collapse/out_of_band"].values())
    return {"run": run.name, "steps outside": outside, "said": said, "range": extremes}


def wrong(name: str, steps: int, responses: int, runs: Path) -> dict[str, Any]:
    config, changes = WRONG[name]
    run = runs / name
    watch = run.with_suffix(".yaml")
    runs.mkdir(parents=True, exist_ok=True)
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_top_k": 0},
        },
        {"class_path": "callbacks.CollapseWatch", "init_args": {"action": "step_back"}},
    ]
    watch.write_text(json.dumps({"trainer": {"callbacks": callbacks, "max_steps": steps}}))
    said = fit(config, run, responses, f"--config={watch}", *changes)
    logged = figures(run)
    backs = logged["collapse/step_backs"]
    at = [s for s in sorted(backs) if s and backs[s] > backs.get(s - 1, 0.0)]
    shown = sorted({0, *at, *(s + 1 for s in at), max(logged["reward"])} & logged["reward"].keys())
    table = {s: [round(logged[name].get(s, float("nan")), 3) for name in FIGURES] for s in shown}
    outside = [s for s, count in logged["collapse/out_of_band"].items() if count]
    return {"run": name, "stepped back at": at, "outside": outside, "said": said, "steps": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=["honest", *WRONG])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--config", default="opd", help="of the honest runs")
    parser.add_argument("--steps", type=int, default=100, help="of the others")
    parser.add_argument("--responses", type=int, default=256, help="of a step")
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    args = parser.parse_args()
    for kind in args.kinds:
        if kind == "honest":
            for seed in args.seeds:
                print(json.dumps(honest(args.config, seed, args.responses, args.runs)), flush=True)
        else:
            print(json.dumps(wrong(kind, args.steps, args.responses, args.runs)), flush=True)


if __name__ == "__main__":
    main()
