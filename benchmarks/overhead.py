"""Cost of a run's diagnostics: each step of the demo with and without them.

Diagnostics are all figures except those that a step needs (the loss, the gradient norm and the
check for infinities): the top-k sets and entropies of both heads, every metric, the engine's gap,
logging, RolloutLog, SignalPlots and CollapseWatch. Measured in two ways, as CPU time per response
token and as a share of the whole step, generation included:

- by pairs: two runs train identically, with equal losses. Each step has diagnostics in one of
  them (on, off, off, on; and the complement), which cancels effects of the step and of drift on the
  training phase;
- in place: the time spent inside the diagnostics, which excludes their effect on caches but varies
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
from opd_lightning.commands.lightning_cli import OPDCLI

ROOT = Path(__file__).parents[1]
WARM_UP = 2 * len(PATTERN)  # steps that are not counted
RESAMPLES = 10_000


def run(config: Path, steps: int, first: bool) -> Alternate:
    """Train for `steps` steps with `Alternate`."""
    with TemporaryDirectory() as folder:
        cli = OPDCLI(
            [
                *("fit", "--config", str(config)),
                f"--trainer.max_steps={steps}",
                f"--trainer.logger.init_args.save_dir={folder}",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.callbacks+=benchmarks.alternate.Alternate",
                f"--trainer.callbacks.first={first}",
            ]
        )
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    (found,) = (c for c in callbacks if isinstance(c, Alternate))
    return found


def by_pairs(one: Alternate, other: Alternate) -> list[float]:
    """Return the additional CPU time of diagnostics in each step."""
    if one.losses != other.losses:
        raise SystemExit("the two runs differ in their losses, so their steps are no pairs")
    pairs = zip(one.is_on, one.learning, other.learning, strict=True)
    return [x - y if is_on else y - x for is_on, x, y in pairs][WARM_UP:]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    draws = random.Random(0)
    means = [mean(draws.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    low, *_, high = quantiles(means, n=40)
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lab" / "opd.yaml")
    options = parser.parse_args()
    runs = [run(options.config, options.steps, first) for first in (True, False)]
    whole = mean(seconds for found in runs for seconds in found.whole[WARM_UP:])
    # Steps with diagnostics.
    steps = [step for found in runs for step in found.inside[WARM_UP:] if step]
    print(f"{1e6 * whole:.1f} us of CPU time per response token; diagnostics, as shares of it:")
    for how, values in (
        ("by pairs", by_pairs(*runs)),
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
