"""Measurements under a time budget; a failure does not end the others."""

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
        kind: Table of the row.
        name: First column.
        seconds: Expected duration; the measurement is left out if less time remains.
        run: Returns its figures.
    """

    kind: str
    name: str
    seconds: float
    run: Callable[[], Figures]


class MissingError(Exception):
    """A requirement of the measurement is missing on this machine."""


def attempt(measurement: Measurement, left: float) -> Figures:
    """Run a measurement and return its row.

    Args:
        measurement: The measurement.
        left: Seconds until it is interrupted.

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
        frames = "".join(traceback.format_exception(error))
        found = {"status": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
        found["traceback"] = frames[-4000:]
    _clean_up()  # after the exception is freed: its frames hold tensors
    return row | {"took_seconds": time.perf_counter() - began} | found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; main thread only."""

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
    """Free device memory for the next measurement."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
