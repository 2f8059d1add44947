"""A run that is killed thirty times ends as one that nothing happened to.

`opd fit ... --ckpt_path last` on the lab, with an EMA teacher, a one-cycle schedule, stale rollouts
if told to, best-of-two checkpoints and texts in the log. SIGKILL to the whole process group at
random moments, while it starts, trains, saves and validates, and the same command again. Its last
checkpoint (weights, optimiser, EMA, counters) and its TensorBoard log are then compared with those
of an uninterrupted run: everything must be equal to the bit.

Run: opd lab build; python benchmarks/kills.py [--kills 30] [--engine vllm] [--ranks 2]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.comparing import compare
from tests.full_run import CONFIG, fit_command, settings
from tests.killing import run_under_fire

ENGINES = {"hf": "HFEngine", "vllm": "VLLMEngine"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--engine", choices=ENGINES, default="hf")
    parser.add_argument("--ranks", type=int, default=1, help="processes, by DDP")
    parser.add_argument("--staleness", type=int, choices=(0, 1), default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    ddp = {"trainer__strategy": "ddp", "trainer__devices": options.ranks}
    changes = {
        "data__engine": {"class_path": f"opd_lightning.rollouts.{ENGINES[options.engine]}"},
        "data__max_staleness": options.staleness,
        **(ddp if options.ranks > 1 else {}),
    }
    with TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        for folder in (whole, killed):
            path = settings(folder, steps=options.steps, **changes)
            (folder / "lab").symlink_to(Path("lab").resolve())
        command = fit_command(CONFIG, path)
        steps, random = options.steps, Random(options.seed)
        quiet = run_under_fire(whole, command, kills=0, steps=steps, random=random)
        print(f"uninterrupted: {quiet.seconds:.0f} s, {quiet.startup:.1f} s of them to start")
        tale = run_under_fire(
            killed,
            command,
            kills=options.kills,
            steps=steps,
            random=random,
            startup=quiet.startup,
        )
        different = compare(killed, whole)
    fell = ", ".join(f"{count} {phase}" for phase, count in sorted(tale.by_phase().items()))
    print(f"{len(tale.kills)} kills ({fell}), {tale.half_written} in the middle of a checkpoint")
    print(f"{tale.redone} of {steps} steps made again, {tale.seconds:.0f} s")
    print("\n".join(sorted(set(tale.said))))
    print("\n".join(different) or "checkpoint and log are equal")
    if options.out:
        figures = {"quiet": asdict(quiet), "killed": asdict(tale), "different": different}
        options.out.write_text(json.dumps(figures, indent=1))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
