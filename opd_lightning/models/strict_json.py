"""JSON without what `json` accepts silently: keys that are set twice, NaN and infinity."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from opd_lightning.errors import cut


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


def dumps(value: Any, **options: Any) -> str:
    """Serialise to JSON, with null for NaN and infinity, which JSON cannot represent.

    Args:
        value: Plain data.
        options: Further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {cut(twice, 40)!r} is set twice")
    return made
