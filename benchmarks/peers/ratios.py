"""Arithmetic on the steps of sides that took turns: ratios with intervals, and tables."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

RESAMPLES = 2_000
GIB = 2**30

Step = Mapping[str, Any]  # a report of `turns.Turns.end`


class Ratio(NamedTuple):
    """Ratio of seconds per response token, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(over: Sequence[Step], under: Sequence[Step], clock: str) -> Ratio:
    """Compare two sides by the steps that they made in the same rounds.

    Seconds and tokens are added up before they are divided. The interval is a bootstrap over
    rounds, so that what slows a whole round down makes no difference. With few rounds it is too
    narrow; one round has an interval of no width.

    Args:
        over: Steps of the side in the numerator, one a round.
        under: Steps of the side in the denominator, of the same rounds.
        clock: "wall" or "cpu".
    """

    def of(rounds: Sequence[int]) -> float:
        one, other = (
            sum(side[i][clock] for i in rounds) / sum(side[i]["tokens"] for i in rounds)
            for side in (over, under)
        )
        return float(one / other)

    if len(over) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} steps are no pairs")
    rounds = range(len(over))
    draws = random.Random(0)
    found = [of(draws.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES)]
    low, *_, high = quantiles(found, n=40)
    return Ratio(of(rounds), low, high)


def compare(sides: Mapping[str, Sequence[Step]], bases: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of figures for every side.

    Args:
        sides: Steps by side, one a round.
        bases: Sides that all sides are divided by, where they are among them.
    """
    rows = []
    for name, steps in sides.items():
        tokens = sum(step["tokens"] for step in steps)
        stages = {stage for step in steps for stage in step["stages"]}
        whole = {clock: 1e6 * sum(s[clock] for s in steps) / tokens for clock in ("wall", "cpu")}
        account = {
            stage: 1e6 * sum(s["stages"].get(stage, 0.0) for s in steps) / tokens
            for stage in sorted(stages)
        }
        if account:
            account["rest"] = whole["wall"] - sum(account.values())
        rows.append(
            {
                "side": name,
                "steps": len(steps),
                "tokens": tokens / len(steps),
                "seconds": median(step["wall"] for step in steps),
                "us_per_token": whole,
                "peak_gib": max(step["peak"] for step in steps) / GIB,
                "stages_us_per_token": account,
                "ratios": {
                    base: {c: ratio(steps, sides[base], c) for c in ("wall", "cpu")}
                    for base in bases
                    if base in sides
                },
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of one size as Markdown: times, memory, and each side over the others."""
    bases = list(rows[0]["ratios"])
    head = ["side", "s/step", "us/token", "CPU us/token", "peak GiB"]
    head += [f"/ {base}, {clock}" for base in bases for clock in ("wall", "CPU")]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        us = row["us_per_token"]
        lines.append(
            [
                row["side"],
                f"{row['seconds']:.2f}",
                f"{us['wall']:.0f}",
                f"{us['cpu']:.0f}",
                f"{row['peak_gib']:.2f}",
                *(str(r) for base in bases for r in row["ratios"][base].values()),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def account(sizes: Mapping[str, Sequence[Mapping[str, Any]]], side: str) -> str:
    """Return a side's stages in microseconds per response token as Markdown, a column a size."""
    found = {
        name: row["stages_us_per_token"]
        for name, rows in sizes.items()
        for row in rows
        if row["side"] == side and row["stages_us_per_token"]
    }
    if not found:
        return ""
    stages = dict.fromkeys(stage for stages in found.values() for stage in stages)
    lines = [["stage", *found], ["---"] * (1 + len(found))]
    for stage in sorted(
        stages, key=lambda s: (s == "rest", -max(f.get(s, 0) for f in found.values()))
    ):
        lines.append([stage, *(f"{column.get(stage, 0.0):.1f}" for column in found.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
