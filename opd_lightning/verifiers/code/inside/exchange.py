"""Plain Python values as JSON lines, between a program and its tests.

Runs in processes that import the standard library alone.
"""

import itertools
import json
import os
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_LINE = 8_000_000  # bytes of a message
MAX_ITEMS = 1_000_000  # items taken from an iterator


class ClosedError(Exception):
    """The other process has ended, or writes what is no message."""


def encode(value: Any) -> Any:
    """Return a value as JSON can hold it.

    Subclasses become their base class, iterators and arrays lists.

    Raises:
        TypeError: If it is no plain value.
    """
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # any length, and not a float on the other side
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__mro__[-2].__name__: bytes(value).hex()}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    if isinstance(value, Fraction):
        return {"Fraction": str(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    kind: Any  # its own __iter__, not that of a subclass
    for kind in (list, tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in kind.__iter__(value)]}
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return encode(value.tolist())
    if hasattr(value, "__next__") or type(value).__name__ in ("dict_keys", "dict_values"):
        items = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise TypeError(f"an iterator of over {MAX_ITEMS} items")
        return encode(items)
    raise TypeError(f"a value of type {type(value).__name__}")


def decode(value: Any) -> Any:
    """Return the value that `encode` was given; raise `ClosedError` if there was none."""
    try:
        return _decode(value)
    except (ValueError, TypeError, ArithmeticError, KeyError, AttributeError) as error:
        raise ClosedError(f"no value: {error}") from None


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | str):
            return value
        raise ClosedError("no value")
    ((kind, given),) = value.items()
    simple: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": float.fromhex,
        "complex": lambda parts: complex(*map(float.fromhex, parts)),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "Decimal": Decimal,
        "Fraction": Fraction,
        "range": lambda parts: range(*parts),
    }
    if kind in simple:
        return simple[kind](given)
    if kind == "dict":
        return {_decode(key): _decode(item) for key, item in given}
    kinds: dict[str, Callable[[Any], Any]] = {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
        "deque": deque,
    }
    return kinds[kind](_decode(item) for item in given)


class Line:
    """Messages to and from another process, over two file descriptors."""

    def __init__(self, read: int, write: int) -> None:
        self._read = os.fdopen(read, "rb")
        self._write = os.fdopen(write, "wb")

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._write.write(json.dumps(message).encode() + b"\n")
            self._write.flush()
        except OSError:
            raise ClosedError("the other process has ended") from None

    def receive(self) -> dict[str, Any]:
        """Return the next message; raise `ClosedError` if there is none."""
        line = self._read.readline(MAX_LINE + 1)
        if not line.endswith(b"\n"):
            raise ClosedError("a message is too long" if line else "the other process has ended")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise ClosedError("no message") from None
        if not isinstance(message, dict):
            raise ClosedError("no message")
        return message
