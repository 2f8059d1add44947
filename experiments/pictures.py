"""Pictures of claims: differences between runs, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from textwrap import fill

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = {"shown": "tab:green", "contradicted": "tab:red", "not shown": "tab:gray"}
LEGEND = ", ".join(f"{own.removeprefix('tab:')}: {verdict}" for verdict, own in COLOURS.items())
ROW, FRAME = 0.32, 0.9  # inches of a claim, and of a panel's axis and title
WIDTH = 64  # characters of a line of a claim; two lines fit into a row


@dataclass(frozen=True)
class Bar:
    """A claim's mean difference and 95 % interval, in the unit of its score, and its verdict."""

    says: str
    score: str
    middle: float
    low: float
    high: float
    verdict: str


def digest(bars: Sequence[Bar]) -> str:
    """Return the digest of what a picture shows, which its metadata hold."""
    return sha256(repr(list(bars)).encode()).hexdigest()


def draw_claims(bars: Sequence[Bar]) -> str:
    """Return an SVG with a panel for every score; the same bars give the same text."""
    scores = list(dict.fromkeys(bar.score for bar in bars))
    panels = [[bar for bar in bars if bar.score == score] for score in scores]
    heights = [ROW * len(panel) + FRAME for panel in panels]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, score, panel in zip(axes, scores, panels, strict=True):
        for row, bar in enumerate(reversed(panel)):
            colour = COLOURS[bar.verdict]
            axis.plot([bar.low, bar.high], [row, row], color=colour, lw=2)
            axis.plot([bar.middle], [row], "o", color=colour)
        axis.axvline(0, color="black", lw=0.8, ls="--")
        said = [fill(bar.says, WIDTH) for bar in reversed(panel)]
        axis.set_yticks(range(len(panel)), said, fontsize=8)
        axis.set_ylim(-0.6, len(panel) - 0.4)
        axis.set_title(f"difference of {score}, 95 % interval", fontsize=9)
    figure.supxlabel(LEGEND, fontsize=8)
    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Identifier": digest(bars)})
    return text.getvalue()
