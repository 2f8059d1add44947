"""What a run's diagnostics cost: steps with them and without, by turns, in one run of the demo.

Off are all figures but those that a step needs (the loss, the gradient norm and the check for
infinities): the top-k sets and entropies of both heads, every metric, the engine's gap, what is
written, RolloutLog, SignalPlots and CollapseWatch. Two figures of it, both of CPU time per response
token and as shares of the whole step, generation included:

- by turns: the learning halves of steps with diagnostics against those without (on, off, off, on:
  what drifts cancels);
- in place: the time inside of the diagnostics, which leaves out what they do to caches, but varies
  little.

Validation is off.

Run: opd lab build; python benchmarks/overhead.py [--steps 200] [--config CONFIG]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import mean, quantiles
from tempfile import TemporaryDirectory

from benchmarks.alternate import PATTERN, Alternate
from opd_lightning.lightning_cli import OPDCLI

ROOT = Path(__file__).parents[1]
WARM_UP = 2 * len(PATTERN)  # steps that are not counted
RESAMPLES = 10_000


def run(config: Path, steps: int) -> Alternate:
    """Train for so many steps, by turns."""
    with TemporaryDirectory() as folder:
        cli = OPDCLI(
            [
                *("fit", "--config", str(config)),
                f"--trainer.max_steps={steps}",
                f"--trainer.logger.init_args.save_dir={folder}",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.callbacks+=benchmarks.alternate.Alternate",
            ]
        )
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, Alternate))
    return found


def by_turns(found: Alternate) -> list[float]:
    """What steps with diagnostics take more than those without, block by block."""
    length = len(PATTERN)
    ends = range(WARM_UP + length, len(found.learning) + 1, length)
    blocks = [zip(found.learning[end - length : end], PATTERN, strict=True) for end in ends]
    return [mean(x if is_on else -x for x, is_on in block) * 2 for block in blocks]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the bootstrap means."""
    draws = random.Random(0)
    means = [mean(draws.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    low, *_, high = quantiles(means, n=40)
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lab" / "opd.yaml")
    options = parser.parse_args()
    found = run(options.config, options.steps)
    whole = mean(found.whole[WARM_UP:])
    steps = [step for step in found.inside[WARM_UP:] if step]  # those that were on
    print(f"{1e6 * whole:.1f} us of CPU time per response token; diagnostics, as shares of it:")
    for how, values in (
        ("by turns", by_turns(found)),
        ("in place", [sum(step.values()) for step in steps]),
    ):
        shares = [value / whole for value in values]
        low, high = interval(shares)
        print(f"  {how}: {mean(shares):.2%} (95 % interval {low:.2%} to {high:.2%})")
    for name in sorted({name for step in steps for name in step}):
        share = mean(step.get(name, 0.0) for step in steps) / whole
        print(f"    {name}: {share:.2%}")


if __name__ == "__main__":
    main()
