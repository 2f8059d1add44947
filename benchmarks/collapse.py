"""Detection by CollapseWatch on the lab: collapsing runs, and false alarms in healthy ones.

Healthy runs use shipped configurations. Collapsing runs change one setting of a shipped
configuration; their action is step_back. The start of a collapse is also determined without the
watch, from reward and truncation (`onset`). All figures come from the runs' TensorBoard files;
existing runs are not repeated.

Run: opd lab build; opd lab build --world identity
python benchmarks/collapse.py [healthy | repetition | rate | smaller-rate | scale ...]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.collapse_rules import Disagreement, Entropy, Length, Repetition, Truncation
from callbacks.collapse_tracks import Tracks
from opd_lightning.types import Prompt
from opd_lightning.verifiers import Verifier

OPD = [sys.executable, "-m", "opd_lightning"]
HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "lab"
BANDS = (Truncation(), Repetition(), Entropy(), Length(), Disagreement())
START_STEPS = 3  # default of CollapseWatch
# Responses of a step, as shipped. Only the full vocabulary trains with fewer: with a quarter of
# them, the reward of the other methods falls at their learning rates.
HEALTHY = {
    "opd": 256,
    "opd_full_vocabulary": 64,
    "g_opd": 256,
    "grpo": 256,
    "edge_opd": 64,
    "sdft": 64,
}
CALLBACKS = {"sdft": ["callbacks.EMATeacherUpdate"]}  # callbacks that a method requires
SAMPLES = {"grpo": 8}  # of a prompt
ANSWER = {
    "class_path": "opd_lightning.verifiers.ExactMatch",
    "init_args": {"pattern": r";(-?\d+)$"},
}

Logged = dict[str, dict[int, float]]  # by name and step


def jump(factor: int) -> list[str]:
    """Return settings that multiply a learning rate of 1e-3 by `factor` at step 20."""
    method = "--model.init_args"
    return [
        f"{method}.optimizer.init_args.lr=1e-3",
        f"{method}.lr_scheduler=torch.optim.lr_scheduler.MultiStepLR",
        f"{method}.lr_scheduler.init_args.milestones=[20]",
        f"{method}.lr_scheduler.init_args.gamma={factor}",
    ]


RESPONSES = 64
# Collapsing runs: configuration, steps, and changes to it.
COLLAPSING: dict[str, tuple[str, int, list[str]]] = {
    "repetition": ("grpo", 80, ["--data.verifier=collapse.PaysRepetition"]),
    "rate": ("opd", 50, jump(30)),
    "smaller-rate": ("opd", 50, jump(10)),
    "scale": ("g_opd", 60, ["--model.init_args.scale=20"]),
}


class PaysRepetition(Verifier):
    """Verifier with a wrong reward: the share of characters that repeat the previous one."""

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [sum(a == b for a, b in pairwise(r)) / 64 for r in responses]


def fit(config: str, run: Path, action: str, steps: int, responses: int, *changes: str) -> None:
    """Train unless the run exists; write the lines of the watch to a file beside the run."""
    if run.with_suffix(".txt").exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    callbacks: list[dict[str, Any]] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_top_k": 0},
        },
        {"class_path": "callbacks.CollapseWatch", "init_args": {"action": action}},
        *({"class_path": name} for name in CALLBACKS.get(config, ())),
    ]
    overlay: dict[str, Any] = {"trainer": {"callbacks": callbacks, "max_steps": steps}}
    if action == "step_back":  # the verifier of training may be the fault
        overlay["data"] = {"validation": {"sums": {"verifier": ANSWER}}}
    run.with_suffix(".yaml").write_text(json.dumps(overlay))
    command = [*OPD, "fit", "--config", str(CONFIGS / f"{config}.yaml")]
    command += ["--config", str(run.with_suffix(".yaml")), "--trainer.enable_progress_bar=false"]
    command += [f"--trainer.val_check_interval={steps}"]
    command += [f"--trainer.logger.init_args.save_dir={run}"]
    command += [f"--data.prompts_per_step={responses // SAMPLES.get(config, 1)}", *changes]
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("opd: ")]
    if done.returncode and not any("out of its band" in line for line in lines):
        sys.exit(done.stderr)
    run.with_suffix(".txt").write_text("\n".join(lines))


def figures(run: Path) -> Logged:
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def false_alarms(run: Path) -> dict[str, Any]:
    """Return start, smallest and largest value, band and steps outside of every figure."""
    logged = figures(run)
    tracks = Tracks((band for band in BANDS if band.figure in logged), START_STEPS)
    outside = dict.fromkeys(
        (track.band.figure for track in tracks), 0
    )  # largest number of consecutive steps
    for step in sorted(logged["loss"]):
        measured = {name: logged[name][step] for name in outside if step in logged[name]}
        tracks.add(measured, step)
        for track in tracks:
            outside[track.band.figure] = max(outside[track.band.figure], track.outside)
    ranges = {}
    for track in tracks:
        name = track.band.figure
        values = logged[name].values()
        row = (track.start, min(values), max(values), *track.bounds, outside[name])
        ranges[name] = " ".join(f"{value:.3g}" for value in row)
    lines = run.with_suffix(".txt").read_text()
    return {"lines": lines, "start, least, largest, band, consecutive steps outside": ranges}


def onset(logged: Logged) -> int | None:
    """Return the first step of a collapse by reward and truncation; None without one.

    More than 0.3 of its responses are truncated, or its reward and the next two are below half of
    the best median over three consecutive earlier steps.
    """
    rewards, best = logged["reward"], 0.0
    for step in sorted(rewards):
        if logged["response/truncated"][step] > 0.3:
            return step
        if step >= 3:
            best = max(best, median(rewards[n] for n in range(step - 3, step)))
        if all(rewards.get(n, best) < best / 2 for n in range(step, step + 3)):
            return step
    return None


def detection(run: Path) -> dict[str, Any]:
    """Return onset, detected steps and rewards of a collapsing run."""
    logged = figures(run)
    lines = run.with_suffix(".txt").read_text().splitlines()
    alarms = [m for x in lines if (m := re.match(r"opd: (?:error: )?step (\d+): (\w+): ", x))]
    caught = [(int(match[1]), match[2]) for match in alarms]
    good = [int(match[1]) for line in lines if (match := re.search(r"after (\d+) steps \(", line))]
    last, rewards = max(logged["reward"]), logged["reward"]
    outside = [step for step, count in logged["collapse/out_of_band"].items() if count]
    found = {
        "onset": onset(logged),
        "first outside": min(outside, default=None),
        "detected": caught,
        "back to": good,
        "last step outside": max(outside, default=None),
        "last step": last,
        "reward before": mean(rewards[n] for n in range(good[-1], good[-1] + 10)) if good else None,
        "reward after": mean(rewards[n] for n in range(last - 9, last + 1)),
    }
    ends = {band.figure: logged[band.figure][last] for band in BANDS if band.figure in logged}
    held_out = logged.get("val/sums/score", {})
    return found | {"held out, at the end": list(held_out.values())[-1:], "end": ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=["healthy", *COLLAPSING])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--healthy", nargs="*", choices=HEALTHY, default=list(HEALTHY), help="configurations"
    )
    parser.add_argument("--steps", type=int, default=100, help="of healthy runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    args = parser.parse_args()

    def show(run: Path, found: dict[str, Any]) -> None:
        print(json.dumps({"run": run.name, **found}), flush=True)

    for kind in args.kinds:
        for seed in args.seeds:
            seeded = f"--seed_everything={seed}"
            if kind != "healthy":
                config, steps, changes = COLLAPSING[kind]
                run = args.runs / f"{kind}-{seed}"
                fit(config, run, "step_back", steps, RESPONSES, seeded, *changes)
                show(run, detection(run))
                continue
            for config in args.healthy:
                run = args.runs / f"healthy-{config}-{seed}"
                fit(config, run, "warn", args.steps, HEALTHY[config], seeded)
                show(run, false_alarms(run))


if __name__ == "__main__":
    main()
