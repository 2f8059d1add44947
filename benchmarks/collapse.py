"""Whether CollapseWatch notices runs that collapse on the lab, and leaves honest ones alone.

Honest runs are shipped configurations. The others are shipped configurations with one thing made
wrong; there the watch steps back. When a collapse began is also told without the watch: by the
reward and by truncation (`onset`). All is read from the runs' TensorBoard files; runs that are
there are not made again.

Run: opd lab build; opd lab build --world identity
python benchmarks/collapse.py [honest | repetition | rate | smaller-rate | scale ...]
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
START_STEPS = 3  # the watch's own
# Responses of a step, as shipped; only the full vocabulary needs fewer. With a quarter of them the
# others' reward falls at their learning rates.
HONEST = {
    "opd": 256,
    "opd_full_vocabulary": 64,
    "g_opd": 256,
    "grpo": 256,
    "edge_opd": 64,
    "sdft": 64,
}
CALLBACKS = {"sdft": ["callbacks.EMATeacherUpdate"]}  # that a method cannot do without
SAMPLES = {"grpo": 8}  # of a prompt
ANSWER = {
    "class_path": "opd_lightning.verifiers.ExactMatch",
    "init_args": {"pattern": r";(-?\d+)$"},
}

Logged = dict[str, dict[int, float]]  # by name and step


def jump(factor: int) -> list[str]:
    """From a learning rate of 1e-3, at step 20."""
    method = "--model.init_args"
    return [
        f"{method}.optimizer.init_args.lr=1e-3",
        f"{method}.lr_scheduler=torch.optim.lr_scheduler.MultiStepLR",
        f"{method}.lr_scheduler.init_args.milestones=[20]",
        f"{method}.lr_scheduler.init_args.gamma={factor}",
    ]


RESPONSES = 64
# What is made wrong: a configuration, steps, and changes to it.
WRONG: dict[str, tuple[str, int, list[str]]] = {
    "repetition": ("grpo", 80, ["--data.verifier=collapse.PaysRepetition"]),
    "rate": ("opd", 50, jump(30)),
    "smaller-rate": ("opd", 50, jump(10)),
    "scale": ("g_opd", 60, ["--model.init_args.scale=20"]),
}


class PaysRepetition(Verifier):
    """A reward that somebody got wrong: the share of characters that repeat the one before."""

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [sum(a == b for a, b in pairwise(r)) / 64 for r in responses]


def fit(config: str, run: Path, action: str, steps: int, responses: int, *changes: str) -> None:
    """Train, unless it is done; what the watch said is left beside the run."""
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
    if action == "step_back":  # the reward may be what is wrong
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
    said = [line for line in done.stderr.splitlines() if line.startswith("opd: ")]
    if done.returncode and not any("out of its band" in line for line in said):
        sys.exit(done.stderr)
    run.with_suffix(".txt").write_text("\n".join(said))


def figures(run: Path) -> Logged:
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def honest(run: Path) -> dict[str, Any]:
    """Of every figure its start, its least and largest value, its band, and the steps outside."""
    logged = figures(run)
    tracks = Tracks((band for band in BANDS if band.figure in logged), START_STEPS)
    outside = dict.fromkeys((track.band.figure for track in tracks), 0)  # in a row, at most
    for step in sorted(logged["loss"]):
        tracks.see({name: logged[name][step] for name in outside if step in logged[name]})
        for track in tracks:
            outside[track.band.figure] = max(outside[track.band.figure], track.outside)
    seen = {}
    for track in tracks:
        name = track.band.figure
        values = logged[name].values()
        row = (track.start, min(values), max(values), *track.bounds, outside[name])
        seen[name] = " ".join(f"{value:.3g}" for value in row)
    said = run.with_suffix(".txt").read_text()
    return {"said": said, "start, least, largest, band, steps outside in a row": seen}


def onset(logged: Logged) -> int | None:
    """The first step that looks broken without the watch, or None.

    More than 0.3 of its responses are truncated, or it is the first of three whose rewards are
    below half of the best that three steps in a row had, in the median, until then.
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


def wrong(run: Path) -> dict[str, Any]:
    """When it began, when it was caught, and what came of it."""
    logged = figures(run)
    said = run.with_suffix(".txt").read_text().splitlines()
    told = [m for line in said if (m := re.match(r"opd: (?:error: )?step (\d+): (\w+): ", line))]
    caught = [(int(match[1]), match[2]) for match in told]
    good = [int(match[1]) for line in said if (match := re.search(r"after (\d+) steps \(", line))]
    last, rewards = max(logged["reward"]), logged["reward"]
    lost = [step for step, count in logged["collapse/out_of_band"].items() if count]
    there = {
        "onset": onset(logged),
        "first outside": min(lost, default=None),
        "caught": caught,
        "back to": good,
        "last step outside": max(lost, default=None),
        "last step": last,
        "reward before": mean(rewards[n] for n in range(good[-1], good[-1] + 10)) if good else None,
        "reward after": mean(rewards[n] for n in range(last - 9, last + 1)),
    }
    ends = {band.figure: logged[band.figure][last] for band in BANDS if band.figure in logged}
    held_out = logged.get("val/sums/score", {})
    return there | {"held out, at the end": list(held_out.values())[-1:], "end": ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=["honest", *WRONG])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--honest", nargs="*", choices=HONEST, default=list(HONEST), help="configurations"
    )
    parser.add_argument("--steps", type=int, default=100, help="of honest runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    args = parser.parse_args()

    def show(run: Path, found: dict[str, Any]) -> None:
        print(json.dumps({"run": run.name, **found}), flush=True)

    for kind in args.kinds:
        for seed in args.seeds:
            seeded = f"--seed_everything={seed}"
            if kind != "honest":
                config, steps, changes = WRONG[kind]
                run = args.runs / f"{kind}-{seed}"
                fit(config, run, "step_back", steps, RESPONSES, seeded, *changes)
                show(run, wrong(run))
                continue
            for config in args.honest:
                run = args.runs / f"honest-{config}-{seed}"
                fit(config, run, "warn", args.steps, HONEST[config], seeded)
                show(run, honest(run))


if __name__ == "__main__":
    main()
