"""Entry points of installed packages, which every Trainer reads all of: 25 CPU ms."""

from functools import cache
from importlib import metadata


def read_once() -> None:
    """Let this process, and those forked from it, read those of a group once, and Lightning's now.

    To be called before Lightning is imported.
    """
    metadata.entry_points = cache(metadata.entry_points)  # type: ignore[assignment]
    metadata.entry_points(group="lightning.pytorch.callbacks_factory")
