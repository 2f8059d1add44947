"""Tokens on a terminal: their colours, and what they may not do to it."""

from __future__ import annotations

import math

from opd_lightning.terminal.token_text import coloured, plain

RED, BLUE = "rgb(214,69,65)", "rgb(38,133,196)"


def styles(tokens: list[str], values: list[float]) -> dict[str, str]:
    text = coloured(tokens, values)
    assert text.plain == "".join(tokens)
    return {text.plain[s.start : s.end]: str(s.style) for s in text.spans}


def test_blue_is_above_red_below_and_the_large_have_a_ground() -> None:
    found = styles(["a", "b", "c", "d", "e"], [2.0, -2.0, 0.5, -0.5, 0.01])
    assert found == {
        "a": f"white on {BLUE}",
        "b": f"white on {RED}",
        "c": BLUE,
        "d": RED,
    }


def test_one_surprise_does_not_bleach_the_rest() -> None:
    tokens = [chr(ord("a") + i % 26) for i in range(100)]
    found = coloured(tokens, [-1.0] * 99 + [-50.0])
    assert len(found.spans) == 100


def test_what_is_unknown_or_zero_has_no_colour() -> None:
    assert styles(["a", "b"], [math.nan, 0.0]) == {}
    assert styles([], []) == {}


def test_a_response_cannot_move_the_cursor() -> None:
    assert plain("a\x1b[2J\rb\n\tc \U0001f642") == "a\\x1b[2J\\rb\n\tc \U0001f642"
    assert coloured(["\x1b[31m"], [1.0]).plain == "\\x1b[31m"


def test_a_coloured_line_break_can_be_seen() -> None:
    assert coloured(["a", "\n"], [0.0, -1.0]).plain == "a\u21b5\n"
