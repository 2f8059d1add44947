"""Imports of large libraries without garbage collections."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections(*, freeze: bool = False) -> Iterator[None]:
    """Disable garbage collections while libraries are imported.

    Libraries make half a million objects, which stay, and each full collection passes over all of
    them: 0.6 CPU seconds.

    Args:
        freeze: Whether later collections leave out everything that exists at the end. Garbage among
            it is never freed, so this is for the start of a process.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()
