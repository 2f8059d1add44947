"""Loss of other abilities when learning hard problems: OPD, SFT and GRPO at one gain, on the lab.

The student is trained from scratch on sums with two and three digits, differences with two, and a
few differences with three. OPD (the lab's teacher), SFT (worked solutions) and GRPO (rewards) then
train on the latter, the hard problems, at one constant learning rate. Runs are compared at the
first evaluation where the gain on held-out hard problems reaches `--gain`. Runs that exist in the
work folder are read, not repeated.

Run: opd lab build; python benchmarks/retention.py [--seeds 0 1 2] [--out retention.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.lab.arithmetic import generate, generate_mixture
from opd_lightning.lab.build import ModelRecipe, train_model
from opd_lightning.lab.problems import write_jsonl

OPD = [sys.executable, "-m", "opd_lightning"]
CONFIG = Path(__file__).parents[1] / "configs" / "lab"
HARD = "sub-3"
KEPT = ("add-2", "add-3", "sub-2")
TEXTS = "worked"  # worked solutions of the kept domains, scored as texts
STUDENT = ModelRecipe(
    layers=2, hidden_size=128, steps=450, batch_size=32, learning_rate=5e-3, seed=0
)
SEEN = 60  # hard problems in pre-training; 3,000 of each other domain
METHODS = {"OPD": "opd", "SFT": "sft", "GRPO": "grpo"}
# Prompts of a step, and responses to each; GRPO learns nothing with as few as the others.
SIZES = {"OPD": (64, 1), "SFT": (64, 1), "GRPO": (32, 8)}


def prepare(work: Path) -> None:
    """Make the student, training prompts and suites, unless they exist."""
    if (work / "student" / "ready").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    known = generate_mixture(KEPT, 3000, seed=0, held_out=False)
    few = generate(HARD, SEEN, seed=0, held_out=False)
    write_jsonl(work / "lessons.jsonl", [*known, *few], with_response=True)
    hard = generate(HARD, 3000, seed=1, held_out=False)
    write_jsonl(work / "train.jsonl", hard, with_response=True)
    held_out = {HARD: 200, **dict.fromkeys(KEPT, 100)}
    for domain, count in held_out.items():
        problems = generate(domain, count, seed=0, held_out=True)
        write_jsonl(work / f"{domain}.jsonl", problems)
    texts = generate_mixture(KEPT, 50, seed=0, held_out=True)
    write_jsonl(work / f"{TEXTS}.jsonl", texts, with_response=True)
    train_model(STUDENT, work / "lessons.jsonl", work / "student", "student")
    (work / "student" / "ready").touch()


def changes(method: str, work: Path, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the changes of a run to the lab's configuration of its method."""
    suites: dict[str, Any] = {d: {"prompts": {"path": str(work / f"{d}.jsonl")}} for d in
                              (HARD, *KEPT)}  # fmt: skip
    texts = {TEXTS: {"prompts": {"path": str(work / f"{TEXTS}.jsonl")}, "batch_size": 50}}
    prompts, samples = SIZES[method]
    return {
        "model": {
            "init_args": {
                "student": {"path": str(work / "student")},
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": options.rate, "weight_decay": 0.0},
                },
                "lr_scheduler": None,
            }
        },
        "data": {
            "train": {"path": str(work / "train.jsonl")},
            "validation": suites,
            "texts": texts,
            "prompts_per_step": prompts,
            "samples_per_prompt": samples,
        },
        "trainer": {
            "max_steps": options.steps,
            "val_check_interval": options.every,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(run), "name": "", "version": ""},
            },
            "enable_checkpointing": False,
            "callbacks": [
                {
                    "class_path": "callbacks.CapabilityRetention",
                    "init_args": {"targets": [HARD], "keep_pareto": False},
                }
            ],
        },
    }


def train(method: str, seed: int, work: Path, options: argparse.Namespace) -> Path:
    """Run `opd fit` unless the run exists; return its folder."""
    run = work / f"{METHODS[method]}-{seed}"
    if not (run / "done").exists():
        file = work / "changes.json"
        file.write_text(json.dumps(changes(method, work, run, options)))
        command = ["fit", "--config", str(CONFIG / f"{METHODS[method]}.yaml")]
        command += ["--config", str(file), "--seed_everything", str(seed)]
        subprocess.run([*OPD, *command], check=True, stdout=subprocess.DEVNULL)
        (run / "done").touch()
    return run


def read(run: Path, level: float) -> dict[str, Any]:
    """Return the curves of a run; "at": figures where the gain first reaches `level`."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if t.startswith("retention/")]
    curves = {t.removeprefix("retention/"): [x.value for x in events.Scalars(t)] for t in tags}
    curves["kl"] = [x.value for x in events.Scalars(f"val/{TEXTS}/kl")]
    steps = [x.step + (x.step > 0) for x in events.Scalars("retention/gain")]
    reached = [i for i, gain in enumerate(curves["gain"]) if gain >= level]
    start = {d: events.Scalars(f"val/{d}/score")[0].value for d in (HARD, *KEPT)}
    found = {"start": start, "highest gain": max(curves["gain"]), "steps": steps, **curves}
    if reached:
        found["at"] = {"step": steps[reached[0]]}
        found["at"] |= {name: curve[reached[0]] for name, curve in curves.items()}
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of mean and standard deviation over seeds that reached the gain."""
    columns = {"step": "step", "gain": HARD} | {f"delta/{d}": d for d in KEPT}
    columns |= {"worst": "worst ability", f"delta/{TEXTS}": "texts, nats a token", "kl": "KL"}
    rows = ["| method | seeds | " + " | ".join(columns.values()) + " |"]
    rows.append("|---" * (len(columns) + 2) + "|")
    for method, found in runs.items():
        there = [run["at"] for run in found if "at" in run]
        cells = [method, f"{len(there)} of {len(found)}"]
        for name in columns:
            values = [run[name] for run in there]
            digits, sign = (0, "") if name == "step" else (3, "+")
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):{sign}.{digits}f}{spread}" if values else "not reached")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/retention"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--gain", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare(options.work)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for method in options.methods:
            run = read(train(method, seed, options.work, options), options.gain)
            found.setdefault(method, []).append(run)
            print(f"{method}, seed {seed}: {run.get('at', run['highest gain'])}", flush=True)
    print(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
