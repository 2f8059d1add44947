"""Measurements of which one that fails, or comes too late, does not end the others."""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

Figures = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One row of a benchmark's tables.

    Args:
        kind: Table that it belongs to.
        name: First column.
        seconds: What it is expected to take; it is left out where that does not fit any more.
        run: Returns its figures.
    """

    kind: str
    name: str
    seconds: float
    run: Callable[[], Figures]


class MissingError(Exception):
    """What is to be measured is not on this machine."""


def attempt(measurement: Measurement, left: float) -> Figures:
    """Run a measurement and return its row.

    Args:
        measurement: What to run.
        left: Seconds after which it is interrupted.

    Returns:
        "status" is "measured", "left out" or "failed". The first comes with the figures, the
        others with a "reason".
    """
    row: Figures = {"kind": measurement.kind, "name": measurement.name}
    if left < measurement.seconds:
        reason = f"{max(left, 0):.0f} s were left and it may take {measurement.seconds:g} s"
        return row | {"status": "left out", "reason": reason}
    began = time.perf_counter()
    try:
        with _interrupted_after(left):
            found = {"status": "measured", **measurement.run()}
    except torch.cuda.OutOfMemoryError as error:
        found = {"status": "failed", "reason": f"out of memory: {_line(error)}"}
    except MissingError as error:
        found = {"status": "left out", "reason": str(error)}
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        found = {"status": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
        found["traceback"] = told[-4000:]
    _clean_up()  # here the exception, whose frames hold tensors, is gone
    return row | {"took_seconds": time.perf_counter() - began} | found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after so many seconds; for the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the budget was spent")

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _clean_up() -> None:
    """Give the next measurement an empty device."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
