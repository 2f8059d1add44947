"""Tables and pictures of a study: scores over seeds, and whether its claims came out."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments.pictures import Bar, draw_claims
from experiments.records import Record, Results, comparable, read_record, write_record
from experiments.study import ROOT, STUDIES, Claim, Study, read_study
from experiments.work import lab_build, place_of

# 97.5 % points of Student's t by degrees of freedom, from 1. For more the last is used, which makes
# intervals wider than they have to be.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SUMMARY = ROOT / "docs" / "results" / "index.md"
VERDICTS = SHOWN, CONTRADICTED, NOT_SHOWN = ("shown", "contradicted", "not shown")
SO_FAR, NO_VERDICT = " so far", "not measured"  # of fewer seeds than planned, of none
BEGIN, END = "<!-- results: {name} -->", "<!-- end of results -->"


def read_results(study: Study, seeds: Sequence[int], work: Path) -> Record:
    """Return what is done or on record."""
    found = read_record(study)
    for seed in seeds:
        if (build := lab_build(study, seed, work)) is None:
            continue
        own = found.setdefault(build, {name: {} for name in study.runs})
        for name in study.runs:
            place = place_of(study, name, seed, work)
            if place.is_done():
                own[name][seed] = place.result()
    return found


def status(study: Study, found: Results, seeds: Sequence[int]) -> str:
    """Return a line for every run: its finished seeds."""
    done = {name: sum(seed in own for seed in seeds) for name, own in found.items()}
    return "\n".join(f"{name}: {count} of {len(seeds)}" for name, count in done.items())


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
    """Return the verdict on a claim from the interval of its differences.

    Of a sign: whether it leaves out 0, and on which side. Of equality: whether all of it lies
    within the margin, or all of it outside.
    """
    if not differences:
        return NO_VERDICT
    low, high = interval(differences)
    if claim.expects == "equal":
        shown = -claim.margin <= low and high <= claim.margin
        contradicted = low > claim.margin or high < -claim.margin
    else:
        above, below = low > 0, high < 0
        shown, contradicted = (above, below) if claim.expects == "higher" else (below, above)
    return SHOWN if shown else CONTRADICTED if contradicted else NOT_SHOWN


def score_tables(found: Results) -> str:
    """Return a Markdown table for runs with the same scores, others in tables of their own."""
    kinds: dict[tuple[str, ...], Results] = {}
    for run, own in found.items():
        if own:
            names = {name for result in own.values() for name in result.scores}
            kinds.setdefault(tuple(sorted(names, key=by_numbers)), {})[run] = own
    return "\n\n".join(score_table(names, runs) for names, runs in kinds.items())


def by_numbers(name: str) -> list[str | int]:
    """Return a key that sorts "step 4" before "step 12"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def score_table(names: Sequence[str], runs: Results) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, CPU minutes, and GiB."""
    columns = [*names, "seeds", "CPU minutes", "GiB"]
    lines = [f"| run | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for run, own in runs.items():
        scores = [result.scores for result in own.values()]
        cells = [spread([row[name] for row in scores if name in row]) for name in names]
        used = mean(result.cpu_seconds for result in own.values()) / 60
        memory = max(result.memory or 0.0 for result in own.values())
        cost = [f"{len(own)}", f"{used:.1f}", f"{memory:.1f}" if memory else ""]
        lines.append(f"| {run} | {' | '.join([*cells, *cost])} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation; empty without values."""
    if not values:
        return ""
    return number(mean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def number(value: float, sign: str = "") -> str:
    """Format with three decimals; from 1,000 as a whole number, from 1e6 with three digits."""
    size = abs(value)
    return format(value, sign + (".3f" if size < 1e3 else ",.0f" if size < 1e6 else ".3g"))


def claim_table(study: Study, found: Results) -> str:
    """Return a Markdown table: claims, paired differences with intervals, verdicts."""
    lines = ["| claim | source | difference | 95 % | verdict |", "|---|---|---|---|---|"]
    for claim in study.claims.values():
        what = f"{claim.says} ({claim.run} - {claim.than}, {claim.score})"
        lines.append(f"| {what} | {claim.source} | {' | '.join(outcome(study, claim, found))} |")
    return "\n".join(lines)


def differences_of(claim: Claim, found: Results) -> list[float]:
    """Return the differences between a claim's runs, of the seeds that both have."""
    left, right = found[claim.run], found[claim.than]
    name = claim.score
    return [
        left[seed].scores[name] - right[seed].scores[name]
        for seed in sorted(left.keys() & right.keys())
    ]


def outcome(study: Study, claim: Claim, found: Results) -> tuple[str, str, str]:
    """Return the mean difference with the number of seeds, its interval, and the verdict.

    The verdict of fewer seeds than the study has is marked as such.
    """
    differences = differences_of(claim, found)
    count = len(differences)
    low, high = interval(differences)
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    middle = f"{number(mean(differences), '+')} ({seeds})" if differences else ""
    bounds = f"{number(low, '+')} to {number(high, '+')}" if count > 1 else ""
    so_far = SO_FAR if 0 < count < study.seeds else ""
    return middle, bounds, verdict(claim, differences) + so_far


def tables(study: Study, found: Results) -> str:
    """Return the tables of scores and that of claims."""
    return score_tables(found) + "\n\n" + claim_table(study, found)


def bars(study: Study, found: Results) -> list[Bar]:
    """Return the claims of a study that were measured with two seeds or more."""
    measured = {claim: differences_of(claim, found) for claim in study.claims.values()}
    return [
        Bar(claim.says, claim.score, mean(own), *interval(own), verdict(claim, own))
        for claim, own in measured.items()
        if len(own) > 1
    ]


def picture_of(study: Study) -> Path:
    """Return the file of a study's picture, beside its page."""
    return (ROOT / study.page).with_name(f"{study.name}_claims.svg")


def section(study: Study, found: Results) -> str:
    """Return what a page shows of a study: tables, and the picture if there are intervals."""
    text = tables(study, found)
    if bars(study, found):
        text += f"\n\n![Differences and intervals]({picture_of(study).name})"
    return text


def write(study: Study, record: Record) -> None:
    """Put results on record, and tables and pictures into the pages that show them.

    These are the pages of all studies that share the runs, and `SUMMARY`.
    """
    write_record(study, record)
    for name in STUDIES:
        other = read_study(name)
        found = comparable(other, read_record(other))
        if other.world == study.world and any(found.values()):
            _insert(ROOT / other.page, name, section(other, found))
            picture = picture_of(other)
            if shown := bars(other, found):
                picture.write_text(draw_claims(shown), encoding="utf-8")
            else:
                picture.unlink(missing_ok=True)
    _insert(SUMMARY, "claims", summary())


def summary() -> str:
    """Return numbers of claims by verdict, CPU hours by lab, and a Markdown table of the claims."""
    lines = [
        "| claim | source | difference | 95 % | verdict | study |",
        "|---|---|---|---|---|---|",
    ]
    counts: Counter[str] = Counter()
    studies = [read_study(name) for name in STUDIES]
    results = [(study, comparable(study, read_record(study))) for study in studies]
    for study, found in results:
        page = Path(os.path.relpath(ROOT / study.page, SUMMARY.parent))
        for claim in study.claims.values():
            result = outcome(study, claim, found)
            counts[result[-1]] += 1
            lines.append(
                f"| {' | '.join((claim.says, claim.source, *result, f'[{study.name}]({page})'))} |"
            )
    order = [f"{verdict}{so_far}" for so_far in ("", SO_FAR) for verdict in VERDICTS] + [NO_VERDICT]
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if verdict in counts)
    hours = cpu_hours(results)
    spent = ", ".join(f"{world} {hours[world]:.1f}" for world in sorted(hours))
    return (
        f"Of {counts.total()} claims: {said}.\n\n"
        f"CPU hours of the runs, by lab: {spent}; together {sum(hours.values()):.1f}.\n\n"
    ) + "\n".join(lines)


def cpu_hours(results: Iterable[tuple[Study, Results]]) -> dict[str, float]:
    """Return the CPU hours of the runs of studies, by lab. A run that several share counts once."""
    cost = {
        (study.world, run, seed): result.cpu_seconds / 3600
        for study, found in results
        for run, seeds in found.items()
        for seed, result in seeds.items()
    }
    hours: dict[str, float] = defaultdict(float)
    for (world, _, _), taken in cost.items():
        hours[world] += taken
    return hours


def _insert(page: Path, name: str, text: str) -> None:
    """Replace what is between the marks of a page."""
    begin = BEGIN.format(name=name)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(END, 1)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")
