"""Functions for the workers of tests, which import no library for them."""

import ctypes
import os
from typing import Any

HANGS = "hangs"


def answer(value: Any) -> Any:
    """Return a value; for `HANGS`, hang in C code that no handler of Python's interrupts."""
    if value == HANGS:
        ctypes.PyDLL(None).sleep(600)  # keeps the GIL, and takes no CPU time
    return value


def nothing() -> None:
    """Prepare a worker that needs no preparation."""


def end() -> None:
    """End the worker that this would prepare."""
    os._exit(3)
