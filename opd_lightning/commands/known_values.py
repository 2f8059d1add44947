"""Refuse values that no type in the annotation of a parameter allows.

The check is one-sided: a type that the source does not explain is taken to allow everything.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import yaml

from opd_lightning.commands.config_files import is_blank
from opd_lightning.commands.signatures import Module, Parameter
from opd_lightning.errors import cut

CONTAINERS = {"list", "tuple", "set", "Sequence", "Iterable", "List", "Tuple"}
TABLES = {"dict", "Mapping", "Dict"}
CLASSES = {"Callable", "type"}  # a configuration names a class for these
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a table of names and values",
    "class": "a class (class_path and init_args) or its options",
    "None": "null",
}


class Word(str):
    """Value of an option on the command line, whose type the parser decides."""


class Kinds(NamedTuple):
    """Types that an annotation allows."""

    names: frozenset[str]  # keys of EXPECTED
    literals: tuple[Any, ...]
    items: Parameter | None  # items of a list, if they have one type
    callable: bool  # a class without which there are no options

    def expected(self) -> str:
        words = [EXPECTED[name] for name in EXPECTED if name in self.names]
        if self.literals:
            words.insert(0, f"one of {', '.join(str(value) for value in self.literals)}")
        return " or ".join(words)


def problem(value: Any, parameter: Parameter) -> str | None:
    """Return "got ..., expected ..." if no type of the parameter allows the value; else None."""
    if isinstance(value, Word) and value in ("null", "None", "~"):
        value = None
    if _plainly_allows(value, parameter) or (kinds := kinds_of(parameter)) is None:
        return None
    if not _allows(value, kinds, parameter):
        return f"got {shown(value)}, expected {kinds.expected()}{_hint(value, kinds)}"
    if isinstance(value, list) and kinds.items is not None:
        for i, item in enumerate(value):
            if (found := problem(item, kinds.items)) is not None:
                return f"item {i}: {found}"
    return None


def words_of(parameter: Parameter) -> set[str]:
    """Return the names in an annotation, unresolved; "Optional" if it contains None."""
    node = parameter.annotation
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    found = {word.id for word in ast.walk(node) if isinstance(word, ast.Name)} if node else set()
    empty = isinstance(node, ast.Constant | ast.BinOp) and any(
        isinstance(word, ast.Constant) and word.value is None for word in ast.walk(node)
    )
    return found | ({"Optional"} if empty else set())


def _plainly_allows(value: Any, parameter: Parameter) -> bool:
    """Return whether the names in an annotation suffice to allow a value; parses no file."""
    words = words_of(parameter)
    if value is None:
        return "Optional" in words or parameter.default == "None"
    if isinstance(value, bool):
        return "bool" in words
    if isinstance(value, int | float):
        return "float" in words and _is_float(value)
    if isinstance(value, str):
        # A number, which the parser would read as one, has to fit.
        return "str" in words and not is_blank(value) and not isinstance(_number(value), int)
    if isinstance(value, dict):
        return bool(value and words - {"int", "float", "str", "bool", "Literal", "Optional"})
    if isinstance(value, list):
        classes = all(isinstance(item, dict) and "class_path" in item for item in value)
        return "list" in words and classes
    return False


def kinds_of(parameter: Parameter) -> Kinds | None:
    """Return the types that a parameter allows; None if they cannot be determined."""
    names: set[str] = set()
    literals: list[Any] = []
    items = None
    callable_ = False
    for part, home in members(parameter):
        name = ast.unparse(part.value if isinstance(part, ast.Subscript) else part)
        name = name.rpartition(".")[2]
        inner = part.slice if isinstance(part, ast.Subscript) else None
        if name in ("int", "float", "str", "bool", "None"):
            names.add(name)
        elif name == "Literal" and inner is not None:
            words = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            try:
                literals += [ast.literal_eval(word) for word in words]
            except ValueError:
                return None
        elif name in CONTAINERS:
            names.add("list")
            if name == "list" and inner is not None:
                items = replace(parameter, annotation=inner, default="", home=home)
        elif name in TABLES:
            names.add("dict")
        elif name in CLASSES or home.resolve(ast.unparse(part)) is not None:
            names.add("class")
            callable_ = callable_ or name in CLASSES
        else:
            return None
    found = Kinds(frozenset(names), tuple(literals), items, callable_)
    return found if names or literals else None


def shown(value: object) -> str:
    """Return a value as YAML writes it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and is_blank(value):
        return "a text that holds nothing"
    is_number = isinstance(value, Word) and _number(value) is not None
    text = repr(str(value) if isinstance(value, str) else value)
    return cut(text.strip("'") if is_number else text, 60)


def members(parameter: Parameter) -> Iterator[tuple[ast.expr, Module]]:
    """Yield the members of a union with the module they are written in; aliases are followed."""
    waiting: list[tuple[ast.expr | None, Module]] = [(parameter.annotation, parameter.home)]
    while waiting:
        node, home = waiting.pop(0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            waiting += [(node.left, home), (node.right, home)]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).rpartition(".")[2] in (
            "Union",
            "Optional",
        ):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            waiting += [(one, home) for one in inner]
            if ast.unparse(node.value).endswith("Optional"):
                waiting.append((ast.Constant(None), home))
        elif isinstance(node, ast.Name) and (alias := home.alias(node.id)) is not None:
            waiting.append(alias)
        elif node is not None and ast.unparse(node).rpartition(".")[2] != "Tensor":
            # Optimisers accept a tensor in place of a number; YAML has no tensors.
            yield node, home


def _allows(value: Any, kinds: Kinds, parameter: Parameter) -> bool:
    names = kinds.names
    if value is None:
        return "None" in names or parameter.default == "None"
    if isinstance(value, bool):
        return bool(names & {"bool", "int", "float", "str"} or kinds.literals)
    if isinstance(value, int | float):
        if value != value:  # NaN
            return not names & {"int", "float"}
        if _fits(value, names):
            return True
        numbers = names & {"int", "float"}
        if numbers and isinstance(value, int):
            return False  # beyond what they hold
        return "str" in names or ("bool" in names and not numbers) or value in kinds.literals
    if isinstance(value, str):
        return _allows_text(value, kinds)
    if isinstance(value, list):
        return "list" in names
    if isinstance(value, dict):
        needs_class = kinds.callable and names <= {"class", "None"}
        return bool(names & {"dict", "class", "list"}) and bool(value or not needs_class)
    return True  # such as a date, which the parser reads as text


def _allows_text(text: str, kinds: Kinds) -> bool:
    names = kinds.names
    number = _number(text)
    if isinstance(number, int) and names & {"int", "float"} and not _fits(number, names):
        return False  # the parser would read it as a number
    if "str" in names:
        return True
    if is_blank(text) or _becomes_null(text):
        return False
    if text in [str(value) for value in kinds.literals]:
        return True
    if number is None:  # a text that the parser may accept
        return bool(names & {"class", "list", "dict", "bool"})
    if not names & {"int", "float"}:
        return "bool" in names
    return _is_float(number) if "float" in names else _is_int(number)


def _becomes_null(text: str) -> bool:
    """Return whether the parser would take a text, such as "&a" or "# b", for null."""
    if text[0].isalnum() or text == "~":
        return False
    with suppress(yaml.YAMLError):
        return yaml.safe_load(text) is None
    return False


def _fits(value: float, names: Set[str]) -> bool:
    """Return whether a number is one of the numeric types among `names`."""
    return ("float" in names and _is_float(value)) or ("int" in names and _is_int(value))


def _is_float(value: float) -> bool:
    """Return whether a number fits a float; False for NaN."""
    return value == value and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def _is_int(value: float) -> bool:
    """Return whether a number is an integer of 64 bits; False for NaN."""
    return abs(value) < 2**63 and value == int(value)


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return int(text)
    try:
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return None


def _hint(value: Any, kinds: Kinds) -> str:
    if isinstance(value, str) and kinds.literals:
        near = get_close_matches(value, [str(word) for word in kinds.literals], n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    return "; leave the key out for its default" if value in (None, {}) else ""
