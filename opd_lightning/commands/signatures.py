"""Signatures and docstrings read from source files, without importing them.

Importing Lightning takes 12 seconds of CPU time, which a misspelt key or a help page need not cost.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import parse as parse_docstring

LONGEST = 200  # characters of a module's name; files may have 255
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor or method; `home` is the module of its annotation."""

    annotation: ast.expr | None
    default: str | None
    text: str
    home: Module


class Module:
    """A parsed source file: its definitions, and the names that it imports."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.definitions: dict[str, ast.stmt] = {}
        self.imported: dict[str, str] = {}
        self.assigned: dict[str, ast.expr] = {}
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: -(node.level - 1) or None] if node.level else []
                origin = ".".join([*parts, *([node.module] if node.module else [])])
                self.imported |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.assigned[node.targets[0].id] = node.value

    def resolve(self, name: str) -> Class | None:
        """Find the class that a name in this module refers to."""
        first, _, rest = name.partition(".")
        node = self.definitions.get(name)
        if isinstance(node, ast.ClassDef):
            return Class(node, self)
        if first in self.imported:
            return find(self.imported[first] + (f".{rest}" if rest else ""))
        return None

    def alias(self, name: str) -> tuple[ast.expr, Module] | None:
        """Find the expression of a type alias, with the module that defines it.

        None for a class, or if the source does not define the name.
        """
        if name in self.assigned:
            return self.assigned[name], self
        owner, _, origin = self.imported.get(name, "").rpartition(".")
        is_library = owner.partition(".")[0] in sys.stdlib_module_names
        module = load(owner) if owner and not is_library else None
        return module.alias(origin) if module is not None and module is not self else None

    def defines(self, name: str) -> bool:
        """Return whether the module may have an attribute of this name."""
        known = self.definitions.keys() | self.imported.keys() | self.assigned.keys()
        if name in known or {"*", "__getattr__"} & known:
            return True
        return (
            self.path.name == "__init__.py"
            and len(name) <= LONGEST
            and ((self.path.parent / name).is_dir() or (self.path.parent / f"{name}.py").is_file())
        )


class Class:
    """A class definition and its module."""

    def __init__(self, node: ast.ClassDef, home: Module) -> None:
        self.node = node
        self.home = home

    @cached_property
    def bases(self) -> list[Class] | None:
        """Base classes; None if one cannot be read."""
        found = [self.home.resolve(ast.unparse(base)) for base in self.node.bases]
        return None if None in found else [base for base in found if base is not None]

    def method(self, name: str) -> tuple[Function, Class] | None:
        """Find a method and the class that defines it, left to right through the bases."""
        for node in self.node.body:
            if isinstance(node, Function) and node.name == name:
                return node, self
        inherited = (base.method(name) for base in self.bases or [])
        return next((method for method in inherited if method), None)

    @property
    def is_dataclass(self) -> bool:
        return any("dataclass" in ast.unparse(word) for word in self.node.decorator_list)

    def options(self) -> dict[str, Parameter] | None:
        """Return the parameters of the constructor by name; None if the source is not enough."""
        if self.is_dataclass:
            return self._fields()
        if self.method("__new__") or (found := self.method("__init__")) is None:
            return None
        node, owner = found
        own = parameters(node, owner)
        if node.args.kwarg is None:
            return own
        keywords = node.args.kwarg.arg
        if not _only_forwards(node, keywords) or owner.bases is None:
            return None
        for base in owner.bases:
            if (inherited := base.options()) is None:
                return None
            given = _given(node, base)
            own = {name: one for name, one in inherited.items() if name not in given} | own
        taken = _taken(node, keywords)
        return {name: Parameter(None, None, "", owner.home) for name in taken} | own

    def _fields(self) -> dict[str, Parameter] | None:
        found: dict[str, Parameter] = {}
        for base in self.bases or []:
            found |= base._fields() or {} if base.is_dataclass else {}
        texts = _texts(self.node)
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                default = None if node.value is None else ast.unparse(node.value)
                name = node.target.id
                found[name] = Parameter(node.annotation, default, texts.get(name, ""), self.home)
        return None if self.bases is None else found


def parameters(node: Function, owner: Class) -> dict[str, Parameter]:
    """Return the parameters of a method by name, with texts of its or its class's docstring."""
    texts = _texts(owner.node) | _texts(node)
    args = node.args.posonlyargs + node.args.args
    defaults: list[ast.expr | None] = [None] * (len(args) - len(node.args.defaults))
    pairs = [*zip(args, [*defaults, *node.args.defaults], strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {
        word.arg: Parameter(
            word.annotation,
            None if value is None else ast.unparse(value),
            texts.get(word.arg, ""),
            owner.home,
        )
        for word, value in pairs
        if word.arg != "self"
    }


@cache
def find(path: str) -> Class | None:
    """Find a class by its import path, through re-exports; None if its source cannot be read."""
    owner, _, name = path.rpartition(".")
    module = load(owner) if owner else None
    return module.resolve(name) if module else None


@cache
def load(name: str) -> Module | None:
    """Parse a module's source file; nothing is imported."""
    if len(name) > LONGEST:
        return None
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        place = Path(folder, *rest)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return _parsed(name, path)
    if spec and not rest and spec.origin and spec.origin.endswith(".py"):
        return _parsed(name, Path(spec.origin))
    return None


def _parsed(name: str, path: Path) -> Module | None:
    try:
        return Module(name, path)
    except (OSError, SyntaxError, ValueError):
        return None  # the import will report the error


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, including those under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
        else:
            yield node


def _only_forwards(node: Function, keywords: str) -> bool:
    """Return whether keyword arguments are passed to the base class and not used otherwise.

    Lightning's DDPStrategy, for example, keeps them for the constructor of another class.
    """
    forwarded = taken = 0
    for call in (word for word in ast.walk(node) if isinstance(word, ast.Call)):
        name = ast.unparse(call.func)
        forwarded += name == "super().__init__" and any(
            word.arg is None and ast.unparse(word.value) == keywords for word in call.keywords
        )
        taken += name in (f"{keywords}.get", f"{keywords}.pop")
    stored = [
        word
        for word in ast.walk(node)
        if isinstance(word, ast.Subscript) and ast.unparse(word.value) == keywords
    ]
    uses = [word for word in ast.walk(node) if isinstance(word, ast.Name) and word.id == keywords]
    return forwarded > 0 and len(uses) == forwarded + taken + len(stored)


def _given(node: Function, base: Class) -> set[str]:
    """Return the parameters of a base's constructor for which a function has values of its own."""
    found = base.method("__init__")
    order = list(parameters(*found)) if found else []
    given: set[str] = set()
    for call in (word for word in ast.walk(node) if isinstance(word, ast.Call)):
        if ast.unparse(call.func) == "super().__init__":
            plain = [word for word in call.args if not isinstance(word, ast.Starred)]
            given |= {*order[: len(plain)], *(word.arg for word in call.keywords if word.arg)}
    return given


def _taken(node: Function, keywords: str) -> set[str]:
    """Return the names that a function reads from keyword arguments with `get` or `pop`."""
    calls = (word for word in ast.walk(node) if isinstance(word, ast.Call) and word.args)
    return {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func) in (f"{keywords}.get", f"{keywords}.pop")
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def _texts(node: Function | ast.ClassDef) -> dict[str, str]:
    found = parse_docstring(ast.get_docstring(node) or "").params
    return {word.arg_name: " ".join((word.description or "").split()) for word in found}
