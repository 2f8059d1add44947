"""Responses as a page whose tokens are coloured by what models said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

ABOVE, BELOW = (38, 133, 196), (214, 69, 65)  # red, green, blue of values above 0 and below
IN_SCALE = 0.98  # share of the tokens that fit in the scale: one surprise must not bleach the rest


class TokenRow(NamedTuple):
    """A response and what is known of each of its tokens."""

    prompt: str
    caption: str
    tokens: Sequence[str]
    figures: Mapping[str, Sequence[float]]  # by name, one a token; NaN: unknown


def token_page(title: str, rows: Sequence[TokenRow]) -> str:
    """One HTML file that needs no other; the first figure colours at first.

    Blue is above 0, red below. A figure named "selected" that is 0 strikes its token through.
    """
    data = [
        {"tokens": row.tokens, "figures": {k: _plain(v) for k, v in row.figures.items()}}
        for row in rows
    ]
    # Nothing in a response may end the script that it stands in.
    text = json.dumps(data).replace("<", "\\u003c")
    environment = Environment(loader=PackageLoader("opd_lightning.terminal", "."), autoescape=True)
    template = environment.get_template("tokens.html")
    colours = {"above": "{} {} {}".format(*ABOVE), "below": "{} {} {}".format(*BELOW)}
    return template.render(title=title, rows=rows, data=Markup(text), in_scale=IN_SCALE, **colours)


def _plain(values: Sequence[float]) -> list[float | None]:
    return [round(value, 5) if math.isfinite(value) else None for value in values]
