"""A run that is killed thirty times ends as one that nothing happened to.

`opd fit ... --ckpt_path last` on the lab, with an EMA teacher, a one-cycle schedule, stale rollouts
if told to, best-of-two checkpoints and texts in the log. SIGKILL to all processes at random
moments, while they start, train, save and validate, and the same command again. Its last
checkpoint (weights, optimiser, EMA, counters), its TensorBoard log and `rollouts.jsonl` are then
compared with those of an uninterrupted run: everything must be equal to the bit. Most starts are
forked from a process that has imported the libraries, so that a kill costs seconds.

Run: opd lab build
     python -m benchmarks.kills [--kills 30] [--engine vllm] [--ranks 2 --strategy fsdp2]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from tests.comparing import compare
from tests.full_run import CONFIG, fit_command, settings
from tests.killing import Tale, run_under_fire

ENGINES = {"hf": "HFEngine", "vllm": "VLLMEngine"}
STRATEGIES: dict[str, Callable[[int], Any]] = {
    "ddp": lambda ranks: "ddp",
    "fsdp2": lambda ranks: {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {
            "data_parallel_size": ranks,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": True,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of a run")
    parser.add_argument("--runs", type=int, default=1, help="killed runs, each with its moments")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the first run")
    parser.add_argument("--cold", type=float, default=0.1, help="share of starts by a shell")
    parser.add_argument("--engine", choices=ENGINES, default="hf")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several")
    parser.add_argument("--staleness", type=int, choices=(0, 1), default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    changes: dict[str, Any] = {
        "data__engine": {"class_path": f"opd_lightning.rollouts.{ENGINES[options.engine]}"},
        "data__max_staleness": options.staleness,
    }
    if options.ranks > 1:
        strategy = STRATEGIES[options.strategy](options.ranks)
        changes |= {"trainer__strategy": strategy, "trainer__devices": options.ranks}
    common = {"steps": options.steps, "ranks": options.ranks}
    figures: dict[str, Any] = {"options": vars(options) | {"out": str(options.out)}, "killed": []}
    differ = False
    with TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        command = _prepare(whole, options.steps, changes)
        quiet = run_under_fire(whole, command, kills=0, cold=1, random=Random(0), **common)
        figures["quiet"] = asdict(quiet)
        print(
            f"uninterrupted: {quiet.seconds:.0f} s, {quiet.startup['cold']:.1f} s of them to start",
            flush=True,
        )
        for seed in range(options.seed, options.seed + options.runs):
            killed = Path(scratch, f"killed-{seed}")
            tale = run_under_fire(
                killed,
                _prepare(killed, options.steps, changes),
                kills=options.kills,
                cold=options.cold,
                random=Random(seed),
                startup=quiet.startup,
                **common,
            )
            different = compare(killed, whole)
            figures["killed"].append(asdict(tale) | {"seed": seed, "different": different})
            _tell(tale, options.steps, different)
            if options.out:
                options.out.write_text(json.dumps(figures, indent=1))
            if different:
                differ = True
            else:
                rmtree(killed)
    sys.exit(differ)


def _prepare(folder: Path, steps: int, changes: dict[str, Any]) -> list[str]:
    """Make a run's folder; the command that starts it."""
    path = settings(folder, steps=steps, **changes)
    (folder / "lab").symlink_to(Path("lab").resolve())
    return fit_command(CONFIG, path)


def _tell(tale: Tale, steps: int, different: list[str]) -> None:
    fell = ", ".join(f"{count} {phase}" for phase, count in sorted(tale.by_phase().items()))
    print(
        f"{len(tale.kills)} kills ({fell}), {tale.half_written} in the middle of a checkpoint, "
        f"{tale.cold} of cold starts"
    )
    print(f"{tale.redone} of {steps} steps made again, {tale.seconds:.0f} s")
    print("\n".join(sorted(set(tale.said))))
    print("\n".join(different) or "checkpoint, log and rollouts are equal", flush=True)


if __name__ == "__main__":
    main()
