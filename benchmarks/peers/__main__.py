"""This program against TRL's trainers, and against the bare stages of a step.

The same models (Qwen3 with random weights), prompts, optimiser and precision; the whole-vocabulary
reverse KL on the student's own samples; temperature 1; no gradient checkpointing. Sides:

- ours-vllm, ours-hf: `DivergenceOPD` with vLLM in the process, and with Hugging Face generate;
- trl: TRL's `DistillationTrainer` with its own generation, which is transformers' generate;
- gkd: TRL's experimental `GKDTrainer`, likewise;
- bare: the stages by hand, in torch and vLLM (`benchmarks/peers/bare.py`).

All sides of a size are alive together. One makes a step while the others wait, in the order A B C,
C B A, A B C, ...; after the warm-up every round gives each side one step. Times are those of whole
steps, from the end of one to the end of the next, logs included; CPU seconds are the process's.
Ratios are of seconds per response token, as sampled lengths differ. Memory is the peak resident
size of a side's process, libraries included.

TRL is part of the `dev` extra. Another environment's TRL is measured with `--trl_python`: it needs
trl 1.16, datasets, tensorboard and the same versions of torch and transformers, and neither vLLM
nor this project:

    python -m venv trl
    trl/bin/pip install trl==1.16.0 datasets tensorboard torch==... transformers==...
    python -m benchmarks.peers --trl_python trl/bin/python

TRL's vLLM mode is left out: it passes vLLM no dtype, so that float32 weights would be halved, and
on a CPU its pushes miss the copy of the head that vLLM multiplies by.

Run: python -m benchmarks.peers --out peers.json [--minutes 14] [--only tiny tail] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.peers.ratios import account, compare, table
from benchmarks.peers.sizes import SIZES, write_world
from benchmarks.peers.turns import Side

SIDES = ("ours-vllm", "ours-hf", "trl", "gkd", "bare")
BASES = ("ours-vllm", "ours-hf", "bare")
LEAST = 2  # rounds of a size, however late it is
PACKAGES = ("torch", "transformers", "trl", "lightning")


@dataclass(frozen=True)
class Plan:
    """How a size is measured: its sides, and its share of the time."""

    sides: tuple[str, ...]
    share: float
    warm_up: int = 1  # rounds


# GKD is left out where its step takes too long, or too much memory.
PLANS = {
    "tiny": Plan(SIDES, 0.1, warm_up=2),
    "middle": Plan(SIDES, 0.3),
    "vocabulary": Plan(("ours-vllm", "ours-hf", "trl", "bare"), 0.4),
    "tail": Plan(("ours-vllm", "ours-hf", "trl", "bare"), 0.2),
}


def start(side: str, world: Path, size: str, options: argparse.Namespace) -> Side:
    """Start a side's process."""
    kind, _, more = side.partition("-")
    words = {
        "ours": ("ours", str(world), size, more, options.precision),
        "trl": ("trl_side", str(world), size, "distillation", options.precision),
        "gkd": ("trl_side", str(world), size, "gkd", options.precision),
        "bare": ("bare", str(world), size, options.precision),
    }
    module, *arguments = words[kind]
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    python = options.trl_python if kind in ("trl", "gkd") else sys.executable
    return Side(python, f"benchmarks.peers.{module}", *arguments, environment=environment)


def take_turns(sides: Mapping[str, Side], warm_up: int, ends: float) -> dict[str, list[Any]]:
    """Return the steps of every side, one a round.

    Args:
        sides: Processes by name, all ready.
        warm_up: Rounds that are left out.
        ends: Time of `perf_counter` after which no round may end, except for the first `LEAST`.
    """
    steps: dict[str, list[Any]] = {name: [] for name in sides}
    last = 0.0
    number = 0
    while number < warm_up + LEAST or perf_counter() + last < ends:
        began = perf_counter()
        for name in [*sides] if number % 2 == 0 else [*sides][::-1]:
            steps[name].append(sides[name].step())
        last = perf_counter() - began
        number += 1
    return {name: found[warm_up:] for name, found in steps.items()}


def measure(name: str, names: Sequence[str], options: argparse.Namespace, ends: float) -> Any:
    """Return rows of `compare` for one size, and the steps that they were computed from."""
    sides: dict[str, Side] = {}
    with TemporaryDirectory() as folder:
        try:
            write_world(Path(folder), SIZES[name])
            for side in names:
                sides[side] = start(side, Path(folder), name, options)
            for process in sides.values():
                process.wait_until_ready()
            steps = take_turns(sides, PLANS[name].warm_up, ends)
        finally:
            for process in sides.values():
                process.stop()
    return compare(steps, BASES), steps


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        # TRL may be in another environment alone.
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PLANS], default=[*PLANS], help="sizes")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="instead of each size's own")
    parser.add_argument("--minutes", type=float, default=14, help="of all sizes together, about")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every size")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    report: dict[str, Any] = {"before": conditions(options), "sizes": {}, "steps": {}}
    began = perf_counter()
    spent = 0.0
    for name in options.only:
        spent += PLANS[name].share / sum(PLANS[other].share for other in options.only)
        ends = began + 60 * options.minutes * spent
        names = options.sides or PLANS[name].sides
        report["sizes"][name], report["steps"][name] = measure(name, names, options, ends)
        report["load_after"] = os.getloadavg()
        print(f"\n{name}\n\n{table(report['sizes'][name])}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    for side in BASES:
        if stages := account(report["sizes"], side):
            print(f"\n{side}: stages, microseconds per response token\n\n{stages}")


if __name__ == "__main__":
    main()
