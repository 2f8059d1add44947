"""Checks of servers' answers: JSON of the expected form, ids of the vocabulary, log-probs.

All raise ValueError, which `Job` turns into one line that names the server and the route.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from opd_lightning.errors import cut

Kind = TypeVar("Kind", bool, int, str, list[Any], dict[str, Any])

KINDS = {
    bool: "true or false",
    int: "a whole number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
# Rounding of a log-softmax may leave the most probable token a little above 0.
ROUNDING = 1e-3  # nats


def field(answer: Any, name: str, kind: type[Kind]) -> Kind:
    """Return a field of a JSON object, which must be of the type `kind`."""
    if not isinstance(answer, dict):
        raise ValueError(f"got {shown(answer)}, expected an object with {name!r}")
    if name not in answer:
        raise ValueError(f"{name!r} is missing")
    return of_kind(answer[name], name, kind)


def of_kind(value: Any, name: str, kind: type[Kind]) -> Kind:
    """Return `value`, which must be of the type `kind`; `name` is for the message."""
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ValueError(f"{name}: got {shown(value)}, expected {KINDS[kind]}")
    return value


def number(value: Any, name: str) -> float:
    """Return a number, which must be one that a float holds; `name` is for the message."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise ValueError(f"{name}: got {shown(value)}, expected a number")
    return float(value)


def token_ids(values: Iterable[Any], name: str, vocabulary: int) -> list[int]:
    """Return token ids, all of which must be in a vocabulary of that size."""
    ids = [of_kind(value, name, int) for value in values]
    for found in ids:
        if not 0 <= found < vocabulary:
            raise ValueError(f"{name}: got token id {shown(found)}, expected 0 to {vocabulary - 1}")
    return ids


def logprobs(values: Any, name: str) -> np.ndarray:
    """Return log-probs as float32, none of which may be NaN or above 0; -inf may be."""
    found = np.asarray(values, dtype=np.float32)
    wrong = ~(found <= ROUNDING)  # true for NaN as well
    if wrong.any():
        raise ValueError(f"{name}: got the log-prob {found[wrong][0]:g}, expected at most 0")
    return found


def shown(value: Any) -> str:
    """Return a short text for a value of JSON."""
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print a long one
    return cut("null" if value is None else repr(value), 60)
