"""Parsing of JSON that refuses what `json` accepts without a word: a key that is set twice."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes, **options: Any) -> Any:
    """Parse JSON text to plain data.

    Args:
        text: One JSON value; bytes are UTF-8.
        options: Further arguments of `json.loads`.

    Raises:
        ValueError: It is no JSON, or an object has a key twice, of which the last would count.
        RecursionError: Values are nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object, **options)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        shown = twice if len(twice) <= 40 else f"{twice[:37]}..."
        raise ValueError(f"the key {shown!r} is set twice")
    return made
