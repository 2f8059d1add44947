"""Our source files, parsed once for all tests of a process: that takes seconds."""

import ast
from functools import cache
from pathlib import Path


@cache
def parsed(path: Path) -> ast.Module:
    """Return the tree of a Python file; tests must not change it."""
    return ast.parse(path.read_text())
