"""Our source files, parsed once for all tests of a process: that takes seconds."""

import ast
from functools import cache
from pathlib import Path

from opd_lightning.terminal.imports import without_collections


@cache
def parsed(path: Path) -> ast.Module:
    """Return the tree of a Python file; tests must not change it."""
    with without_collections():  # which are most of its time
        return ast.parse(path.read_text())
