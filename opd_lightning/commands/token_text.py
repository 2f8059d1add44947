"""Responses on a terminal, their tokens coloured by what models said of them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from rich.text import Text

from opd_lightning.terminal.token_page import ABOVE, BELOW, IN_SCALE

FAINT, STRONG = 0.1, 0.5  # shares of the scale: below the first no colour, from the second a ground


def coloured(tokens: Sequence[str], values: Sequence[float]) -> Text:
    """Blue above 0, red below, as on a page; what is unknown has no colour.

    Letters are coloured where the value is small and their ground where it is large, so that it
    reads well on dark and light terminals.

    Args:
        tokens: Pieces of the text.
        values: One a token; NaN: unknown.
    """
    most = _scale(values)
    text = Text()
    for token, value in zip(tokens, values, strict=True):
        share = value / most if math.isfinite(value) else 0.0
        red, green, blue = BELOW if share < 0 else ABOVE
        colour = f"rgb({red},{green},{blue})"
        style = "" if abs(share) < FAINT else colour
        if abs(share) >= STRONG:
            style = f"white on {colour}"
        text.append(plain(token.replace("\n", "\u21b5\n") if style else token), style)
    return text


def plain(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text
    )


def _scale(values: Sequence[float]) -> float:
    """Of all values most fit in: one surprise must not bleach the rest."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return (sizes[int(IN_SCALE * (len(sizes) - 1))] if sizes else 0.0) or 1.0
