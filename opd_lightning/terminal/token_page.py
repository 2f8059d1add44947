"""HTML page of responses with tokens coloured by their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

ABOVE, BELOW = (38, 133, 196), (214, 69, 65)  # red, green, blue of values above 0 and below
IN_SCALE = 0.98  # fraction of tokens within the colour scale, so that outliers do not set it


class TokenRow(NamedTuple):
    """A response and the figures of its tokens."""

    prompt: str
    caption: str
    tokens: Sequence[str]
    figures: Mapping[str, Sequence[float]]  # by name, one value per token; NaN: unknown


def token_page(title: str, rows: Sequence[TokenRow]) -> str:
    """Render a self-contained HTML page, initially coloured by the first figure.

    Blue is above 0, red below. A token whose figure "selected" is 0 is struck through.
    """
    data = [
        {"tokens": row.tokens, "figures": {k: _plain(v) for k, v in row.figures.items()}}
        for row in rows
    ]
    # No text of a response may end the script element that holds it.
    text = json.dumps(data).replace("<", "\\u003c")
    environment = Environment(loader=PackageLoader("opd_lightning.terminal", "."), autoescape=True)
    template = environment.get_template("tokens.html")
    colours = {"above": "{} {} {}".format(*ABOVE), "below": "{} {} {}".format(*BELOW)}
    return template.render(title=title, rows=rows, data=Markup(text), in_scale=IN_SCALE, **colours)


def _plain(values: Sequence[float]) -> list[float | None]:
    return [round(value, 5) if math.isfinite(value) else None for value in values]
