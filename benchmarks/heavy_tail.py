"""Steps whose responses have a heavy tail: padding, and seconds beside another commit.

Prints positions over tokens in nine cells (three kinds of lengths, three numbers of
micro-batches), padded and packed. With `--before COMMIT` it then trains the same steps of a small
model in this tree and in a temporary worktree of that commit, in turn: a program in each tree stays
alive, and makes a step when it is told to. Forward passes of student and teacher, backward, checks,
figures and AdamW are in the seconds, all on the CPU.

Run: python -m benchmarks.heavy_tail [--before 88585ac] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PROMPT = 512  # tokens
KINDS = {  # mean and deviation of the logarithm, and most tokens, of 512 responses
    "short": (4.5, 0.7, 512),
    "medium": (7.1, 0.7, 4096),
    "heavy": (7.8, 1.0, 16_384),
}
MICRO_BATCHES = (16, 32, 128)
# Of the timed steps.
ROWS, PARTS, WARM_UP = 128, 8, 1
LENGTHS = (4.5, 1.0, 768)
TIMED_PROMPT, VOCABULARY = 32, 512
TURNS = (0, 1, 1, 0)  # which tree makes a step


def lengths(kind: tuple[float, float, int], count: int) -> list[int]:
    """Tokens of responses: a capped lognormal."""
    mean, deviation, most = kind
    drawn = np.random.default_rng(0).lognormal(mean, deviation, count)
    return [max(1, int(n)) for n in np.minimum(drawn, most)]


def rollouts(tokens: Sequence[int], prompt: int) -> list[Any]:
    """Rollouts of so many random tokens each, of what types both trees have."""
    from opd_lightning.types import Author, Prompt, Rollout, StopReason

    draw = np.random.default_rng(1)
    asked = Prompt(id="random", messages=({"role": "user", "content": ""},))
    return [
        Rollout(
            prompt=asked,
            prompt_ids=draw.integers(1, VOCABULARY, prompt).tolist(),
            views={},
            group=i,
            response_ids=draw.integers(1, VOCABULARY, n).tolist(),
            behaviour_logprobs=[-1.0] * n,
            stop_reason=StopReason.LENGTH,
            text="",
            reward=0.0,
            group_mean=0.0,
            group_std=0.0,
            author=Author.STUDENT,
            dropped=False,
            policy_version=0,
        )
        for i, n in enumerate(tokens)
    ]


# Padding ----------------------------------------------------------------------------------


def positions(part: Sequence[Any], packed: bool) -> int:
    sizes = [len(one.prompt_ids) + len(one.response_ids) for one in part]
    return sum(sizes) if packed else len(sizes) * max(sizes)


def padding() -> str:
    """Table of positions over tokens."""
    from benchmarks.scaling.tables import table
    from opd_lightning.data.micro_batches import split_by_cost

    heads = ["512 responses, mean tokens"]
    heads += [f"{n} micro-batches, {way}" for n in MICRO_BATCHES for way in ("padded", "packed")]
    lines = []
    for name, kind in KINDS.items():
        rows = rollouts(lengths(kind, 512), PROMPT)
        tokens = positions(rows, packed=True)
        cells = []
        for parts in MICRO_BATCHES:
            for packed in (False, True):
                split = split_by_cost(rows, parts, packed=packed)
                cells.append(sum(positions(part, packed) for part in split) / tokens)
        mean = tokens / len(rows) - PROMPT
        lines.append([f"{name}, {mean:,.0f}", *(f"{cell:.2f}" for cell in cells)])
    return table(heads, lines)


# A tree's program -------------------------------------------------------------------------


def train(folder: str, steps: int) -> None:
    """Train in the tree that is imported: a step for every line on stdin, its seconds to stdout."""
    import logging
    import warnings

    told, sys.stdout = sys.stdout, sys.stderr  # libraries that print do not come between
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from opd_lightning.data import micro_batches
    from opd_lightning.data.collate import collate
    from opd_lightning.methods import OPD
    from opd_lightning.rollouts import Sampling
    from opd_lightning.student import Student
    from opd_lightning.teachers import FrozenTeacher
    from opd_lightning.types import StepTotals, Totals

    torch.set_num_threads(1)
    rows = rollouts(lengths(LENGTHS, ROWS), TIMED_PROMPT)
    # Called `split_balanced` in the first of the commits that this is compared with.
    split: Any = getattr(micro_batches, "split_by_cost", None) or micro_batches.split_balanced  # type: ignore[attr-defined]
    parts = split(rows, PARTS)
    written = Totals(sum(len(r.response_ids) for r in rows), len(rows))

    def batches(step: int) -> list[Any]:
        totals = StepTotals(step=step, written=written, demonstrated=Totals(0, 0))
        return [collate(p, totals=totals, temperature=1.0, pad_id=0) for p in parts]

    class Loader:
        def __len__(self) -> int:
            return steps * PARTS

        def __iter__(self) -> Iterator[Any]:
            for step in range(steps):
                yield from batches(step)

    class Data(LightningDataModule):
        sampling = Sampling(max_new_tokens=LENGTHS[2])

        def train_dataloader(self) -> Loader:
            return Loader()

        def compares_with_start(self, stage: str) -> bool:
            return False

    class Turns(Callback):
        began = 0.0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index % PARTS == 0:
                sys.stdin.readline()
                module.timer.next_step()
                self.began = time.process_time()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            if (index + 1) % PARTS == 0:
                print(time.process_time() - self.began, file=told, flush=True)

    places = sum(positions(part, packed=False) for part in parts)
    print(
        json.dumps({"positions": places, "tokens": positions(rows, packed=True)}),
        file=told,
        flush=True,
    )
    module = OPD(Student(folder), FrozenTeacher(folder), max_logprob_gap=float("inf"))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=PARTS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(module, datamodule=Data())


# Both in turn -----------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opd_lightning.lab.tokenizer import build_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    build_tokenizer(2048).save_pretrained(folder)


@contextmanager
def tree_of(commit: str, folder: Path) -> Iterator[Path]:
    """A temporary worktree of the repository."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(tree: Path, model: Path, steps: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-P", __file__, "--train", str(model), "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def one_step(program: subprocess.Popen[str]) -> float:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("\n")
    program.stdin.flush()
    return float(program.stdout.readline())


def compare(commit: str, rounds: int) -> str:
    """Table of a step's CPU seconds in both trees."""
    from benchmarks.scaling.tables import table

    steps = WARM_UP + rounds * len(TURNS) // 2
    with TemporaryDirectory() as place, tree_of(commit, Path(place) / "tree") as before:
        model = Path(place) / "model"
        write_model(model)
        programs = [start(tree, model, steps) for tree in (before, ROOT)]
        sizes = [json.loads(program.stdout.readline()) for program in programs]  # type: ignore[union-attr]
        for program in programs * WARM_UP:
            one_step(program)
        seconds: list[list[float]] = [[], []]
        for turn in TURNS * rounds:
            seconds[turn].append(one_step(programs[turn]))
        for program in programs:
            program.communicate()
    rows = [
        [name, f"{s['positions'] / s['tokens']:.2f}", f"{median(x):.2f}",
         f"{min(x):.2f} to {max(x):.2f}"]
        for name, s, x in zip((commit, "this tree"), sizes, seconds, strict=True)
    ]  # fmt: skip
    pairs = [a / b for a, b in zip(*seconds, strict=True)]
    heads = ["tree", "positions over tokens", "CPU seconds a step", "range"]
    return (
        f"{table(heads, rows)}\n\n{median(pairs):.2f} times as fast, median of {len(pairs)} pairs "
        f"({min(pairs):.2f} to {max(pairs):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="commit to compare a step's seconds with")
    parser.add_argument("--rounds", type=int, default=3, help="of two steps in each tree")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.steps)
        return
    print(padding())
    if options.before:
        print("\n" + compare(options.before, options.rounds))


if __name__ == "__main__":
    main()
