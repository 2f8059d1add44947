"""Tables of a study: scores over seeds, and whether its claims came out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments.study import ROOT, Claim, Study
from experiments.work import Place

# 97.5 % points of Student's t by degrees of freedom, from 1. For more the last is used, which makes
# intervals wider than they have to be.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BEGIN, END = "<!-- results: {name} -->", "<!-- end of results -->"

Scores = Mapping[int, Mapping[str, float]]  # by seed and name


def read_scores(study: Study, seeds: Sequence[int], work: Path) -> dict[str, Scores]:
    """Return what is done, by run, seed and score."""
    found: dict[str, Scores] = {}
    for name in study.runs:
        done = [place for seed in seeds if (place := Place(name, seed, work)).is_done()]
        found[name] = {place.seed: json.loads(place.scores.read_text()) for place in done}
    return found


def status(study: Study, seeds: Sequence[int], work: Path) -> str:
    """Return a line for every run: its finished seeds."""
    found = read_scores(study, seeds, work)
    return "\n".join(f"{name}: {len(own)} of {len(seeds)}" for name, own in found.items())


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of differences between paired seeds, Student's t.

    With one seed it is unbounded.
    """
    count = len(differences)
    if count < 2:
        return -math.inf, math.inf
    margin = T[min(count - 2, len(T) - 1)] * stdev(differences) / math.sqrt(count)
    return mean(differences) - margin, mean(differences) + margin


def verdict(claim: Claim, differences: Sequence[float]) -> str:
    """Return what the interval says of a claim.

    Of a sign: whether it leaves out 0, and on which side. Of equality: whether all of it lies
    within the margin, or all of it outside.
    """
    if not differences:
        return "not measured"
    low, high = interval(differences)
    if claim.expects == "equal":
        shown = -claim.margin <= low and high <= claim.margin
        contradicted = low > claim.margin or high < -claim.margin
    else:
        above, below = low > 0, high < 0
        shown, contradicted = (above, below) if claim.expects == "higher" else (below, above)
    return "shown" if shown else "contradicted" if contradicted else "not shown"


def score_table(study: Study, found: Mapping[str, Scores], work: Path) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, and CPU minutes."""
    names = sorted({name for own in found.values() for scores in own.values() for name in scores})
    lines = [
        f"| run | {' | '.join(names)} | seeds | CPU minutes |",
        "|---" * (len(names) + 3) + "|",
    ]
    for run, own in found.items():
        if not own:
            continue
        cells = [spread([s[name] for s in own.values() if name in s]) for name in names]
        used = [float(Place(run, seed, work).used.read_text()) / 60 for seed in own]
        lines.append(f"| {run} | {' | '.join(cells)} | {len(own)} | {mean(used):.1f} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; nothing of nothing."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def claim_table(study: Study, found: Mapping[str, Scores]) -> str:
    """Return a Markdown table: claims, paired differences with intervals, verdicts."""
    lines = ["| claim | source | difference | 95 % | verdict |", "|---|---|---|---|---|"]
    for claim in study.claims.values():
        left, right = found[claim.run], found[claim.than]
        both = sorted(left.keys() & right.keys())
        differences = [left[seed][claim.score] - right[seed][claim.score] for seed in both]
        low, high = interval(differences)
        middle = f"{mean(differences):+.3f} ({len(both)} seeds)" if both else ""
        bounds = f"{low:+.3f} to {high:+.3f}" if len(both) > 1 else ""
        what = f"{claim.says} ({claim.run} - {claim.than}, {claim.score})"
        lines.append(
            f"| {what} | {claim.source} | {middle} | {bounds} | {verdict(claim, differences)} |"
        )
    return "\n".join(lines)


def tables(study: Study, seeds: Sequence[int], work: Path) -> str:
    """Return both tables."""
    found = read_scores(study, seeds, work)
    return score_table(study, found, work) + "\n\n" + claim_table(study, found)


def write_page(study: Study, seeds: Sequence[int], work: Path) -> None:
    """Put the tables between the marks of the study's page."""
    page = ROOT / study.page
    text = page.read_text()
    begin = BEGIN.format(name=study.name)
    before, rest = text.split(begin)
    _, after = rest.split(END, 1)
    page.write_text(f"{before}{begin}\n\n{tables(study, seeds, work)}\n\n{END}{after}")
