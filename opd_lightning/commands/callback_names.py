"""Import names of the callbacks: `callbacks` in a checkout, `opd_lightning_callbacks` in a wheel.

A wheel must not install a package named `callbacks`, which is another project's name on PyPI. YAML
files use `callbacks.X` with both installations, so each name is an alias of the other where that is
missing. Both names give the same module objects, hence the same classes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

SHORT = "callbacks"
INSTALLED = "opd_lightning_callbacks"
_ROOT = Path(__file__).parents[2]  # the checkout, or site-packages


def install_callback_names() -> None:
    """Make both names importable in this process."""
    if not any(isinstance(finder, _Names) for finder in sys.meta_path):
        # First, because the path finder would load submodules of an alias again.
        sys.meta_path.insert(0, _Names())


def explain_taken_name(message: str) -> str | None:
    """Explain a class path that failed because `callbacks` is another package in this process.

    Args:
        message: The parser's error.

    Returns:
        One line for the user, or None where the message is about something else.
    """
    found = re.search(rf"(?<![\w.]){SHORT}\.(\w+)", message)
    if found is None or _is_ours(spec := PathFinder.find_spec(SHORT)):
        return None
    place = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
    return (
        f"class_path: got {found[0]!r}, but {SHORT!r} is another package here ({place}); write "
        f"'{INSTALLED}.{found[1]}'"
        if place and hasattr(import_module(INSTALLED), found[1])
        else None
    )


def is_our_package(name: str, source: Path) -> bool:
    """Return whether a package found by one of the names is the one of this installation.

    Args:
        name: Name of a package, callbacks or another.
        source: Its `__init__.py`.
    """
    return name not in (SHORT, INSTALLED) or source.parent == _home()


def _home() -> Path:
    """Return the folder that holds the callbacks of this installation."""
    return _ROOT / INSTALLED if (_ROOT / INSTALLED).is_dir() else _ROOT / SHORT


def _is_ours(spec: ModuleSpec | None) -> bool:
    return spec is not None and bool(spec.origin) and Path(str(spec.origin)).parent == _home()


class _Names(MetaPathFinder):
    """Finder of the two names; other names are left to later finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, dot, rest = fullname.partition(".")
        if root not in (SHORT, INSTALLED):
            return None
        if dot:
            name = sys.modules[root].__name__
            return _alias(fullname, f"{name}.{rest}") if name != root else None
        if PathFinder.find_spec(root) is not None:
            return None
        if root == SHORT:
            return _alias(SHORT, INSTALLED)
        if _is_ours(PathFinder.find_spec(SHORT)):
            return _alias(INSTALLED, SHORT)
        # In a checkout where the short name finds another package first.
        folder = _home()
        return spec_from_file_location(
            INSTALLED, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def _alias(name: str, target: str) -> ModuleSpec:
    return ModuleSpec(name, _AliasLoader(target))


class _AliasLoader(Loader):
    """Loader of a module that exists by another name.

    Args:
        target: The name it is imported by.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.target)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib has just replaced it by the alias's
