"""What we use of other libraries beside their public interfaces is listed, and is still there.

The list is tests/private_names.yaml.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sources import parsed

ROOT = Path(__file__).parents[2]
LIST: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(
    (ROOT / "tests" / "private_names.yaml").read_text()
)
LIBRARIES = (
    *("lightning", "vllm", "torch", "torchmetrics", "transformers", "peft", "jsonargparse"),
    *("filelock", "tensorboard", "lm_eval", "datasets", "rich", "httpx", "pebble"),
)
# Documented in spite of their underscore: named tuples', and the end of a process.
PUBLIC = {"_asdict", "_replace", "_fields", "_exit"}
PRIVATE = re.compile(r"_[A-Za-z]\w*")

# Modules of vLLM 0.32 that 0.33 has elsewhere; one of each pair must be there.
MOVED = {"vllm.entrypoints.launchers.cli_args": "vllm.entrypoints.common.cli_args"}
LISTED = sorted({name for section in LIST.values() for names in section.values() for name in names})


@cache
def trees() -> dict[str, ast.Module]:
    """Return our files, parsed, by their paths."""
    return {
        str(path.relative_to(ROOT)): parsed(path)
        for package in ("opd_lightning", "callbacks")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def is_private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None and name not in PUBLIC


# Are they still there? ------------------------------------------------------------------------


def resolve(listed: str) -> None:
    """Raise LookupError unless the name exists."""
    module, _, path = listed.partition(":")
    found: Any = importlib.import_module(module)
    *owners, name = path.split(".") if path else [module.rpartition(".")[2]]
    if not path:
        return
    for owner in owners:
        found = getattr(found, owner)
    if hasattr(found, name):
        return
    classes = inspect.getmro(found) if inspect.isclass(found) else ()
    if any(name in inspect.get_annotations(one) for one in classes):  # a dataclass's field
        return
    if not any(sets(one, name) for one in classes if one.__module__ != "builtins"):
        raise LookupError(f"{listed}: gone")


def sets(one: type, name: str) -> bool:
    """Whether the class assigns `self.<name>`."""
    return re.search(rf"\bself\.{name}\b *(:[^=\n]+)?=", source_of(one)) is not None


@cache
def source_of(one: type) -> str:
    try:
        return inspect.getsource(one)
    except (OSError, TypeError):  # not written in Python
        return ""


@pytest.mark.parametrize("listed", [name for name in LISTED if not name.startswith("vllm")])
def test_a_listed_name_exists(listed: str) -> None:
    if (library := listed.split(".")[0]) in ("lm_eval", "uvicorn"):  # uvicorn comes with vLLM
        pytest.importorskip(library)
    resolve(listed)


@pytest.mark.vllm
def test_the_listed_names_of_vllm_exist() -> None:
    for listed in LISTED:
        if listed.startswith("vllm"):
            resolve(where_installed(listed))


def where_installed(listed: str) -> str:
    """The name with the module that the installed vLLM has it in."""
    module, _, name = listed.partition(":")
    for pair in MOVED.items():
        if module in pair:
            there = [one for one in pair if importlib.util.find_spec(one)]
            return f"{there[0]}:{name}" if there else listed
    return listed


def test_what_is_gone_is_noticed() -> None:
    with pytest.raises(LookupError):
        resolve("lightning.pytorch.callbacks:ModelCheckpoint._never_was")


# Are all of them listed? ----------------------------------------------------------------------


def touched(tree: ast.Module) -> Iterator[str]:
    """Private names of other objects than `self`: attributes, imports, and names as strings."""
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    pieces = {id(part) for text in texts for part in text.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARIES):
            yield from (*(node.module or "").split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and id(node) not in pieces:
            yield str(node.value)


def is_own(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def assigned(tree: ast.Module) -> set[str]:
    """Names that a file gives to attributes of its own objects, and its methods."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return own | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


SUFFIXES = {"_stderr", "_hooks"}  # of names that are put together


def listed_in(file: str) -> set[str]:
    return {last(name) for name in LIST["private"].get(file, ())}


def test_private_names_of_other_objects_are_listed() -> None:
    missing = {
        file: {name for name in touched(tree) if is_private(name)}
        - listed_in(file)
        - assigned(tree)
        - SUFFIXES
        for file, tree in trees().items()
    }
    assert {file: names for file, names in missing.items() if names} == {}


def foreign(one: type) -> list[type]:
    """Bases of a class that other libraries define."""
    return [base for base in one.__mro__ if base.__module__.split(".")[0] in LIBRARIES]


def own_classes(file: str) -> Iterator[type]:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for one in vars(module).values():
        if inspect.isclass(one) and one.__module__ == module.__name__ and foreign(one):
            yield one


def imports_vllm(tree: ast.Module) -> bool:
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return any((node.module or "").startswith(("vllm", "uvicorn")) for node in imports)


def test_private_names_of_base_classes_are_listed() -> None:
    """A class of ours that uses, overrides or hides a private name of its base says so."""
    missing = []
    for file, tree in trees().items():
        if imports_vllm(tree) or file.endswith("__main__.py") or "/inside/" in file:
            continue  # what is inside of a sandbox is run by its path, and has no package
        bodies = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for one in own_classes(file):
            body = bodies[one.__name__]
            used = {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
            used |= {node.name for node in body.body if isinstance(node, ast.FunctionDef)}
            for name in sorted(filter(is_private, used - listed_in(file))):
                owners = [base for base in foreign(one) if name in vars(base) or sets(base, name)]
                missing += [f"{file}: {one.__name__}.{name}, of {o.__qualname__}" for o in owners]
    assert missing == []


def test_imports_from_vllm_are_listed() -> None:
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                names = {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names if alias.name.startswith("vllm.")}
            else:
                continue
            if names:
                found[file] = found.get(file, set()) | names
    assert found == {file: set(names) for file, names in LIST["vllm_imports"].items()}


def test_the_list_has_nothing_that_is_not_used() -> None:
    for section in LIST.values():
        for file, names in section.items():
            text = (ROOT / file).read_text()
            unused = [name for name in names if not re.search(rf"\b{last(name)}\b", text)]
            assert unused == [], file


def last(name: str) -> str:
    return re.split(r"[.:]", name)[-1]
