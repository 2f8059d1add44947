"""Terminal text with tokens coloured by their figures."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from rich.text import Text

from opd_lightning.terminal.token_page import ABOVE, BELOW, IN_SCALE

FAINT, STRONG = 0.1, 0.5  # shares of the scale: no colour below, coloured background from


def coloured(tokens: Sequence[str], values: Sequence[float]) -> Text:
    """Return the text in blue for values above 0 and red below, as on an HTML page.

    Small values colour the letters and large ones the background, which is legible on dark and
    light terminals.

    Args:
        tokens: Texts of the tokens.
        values: One value per token; NaN has no colour.
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
    """Return the text with control characters escaped, except line breaks and tabs."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text
    )


def _scale(values: Sequence[float]) -> float:
    """Return a high quantile of the absolute values, so that outliers do not fade the others."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return (sizes[int(IN_SCALE * (len(sizes) - 1))] if sizes else 0.0) or 1.0
