"""Refuse misspelt keys of YAML files and the command line before the heavy imports.

The parser does this too, with the types of the values, but only after Lightning is imported. What
the source does not tell for certain is left to the parser.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.commands.signatures import Class, Parameter, find, parameters
from opd_lightning.errors import UserError

TRAINER = "opd_lightning.commands.trainer.Trainer"
DATA = "opd_lightning.run.datamodule.RolloutDataModule"
MODEL = "opd_lightning.training.base.DistillationModule"

# Options of every command, besides the parameters of its method.
COMMON = ("config", "help", "print_config", "seed_everything", "model", "data", "trainer")
# Parameters of its method that are no options: Lightning fills them, or nothing needs them.
NOT_OPTIONS = {
    "model",
    "datamodule",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "weights_only",
}
_SUBCLASS = {"class_path", "init_args", "dict_kwargs"}


def check_keys(command: str, words: list[str]) -> None:
    """Raise UserError at the first key that no class of the program accepts."""
    trainer = find(TRAINER)
    method = trainer.method(command.replace("-", "_")) if trainer else None
    if method is None:
        return
    own = [name for name in parameters(*method) if name not in NOT_OPTIONS]
    checker = _Checker(command, [*COMMON, *own])
    for source, tree in _given(words):
        checker.check(source, tree)


def _given(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every YAML file and option of a command line as a tree of keys, in order."""
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            value = value if equals else next(rest, "")
            if value.endswith((".yaml", ".yml")) and not Path(value).exists():
                raise UserError(f"--config: got {value!r}, but no such file exists")
            try:
                tree = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(tree, dict):
                yield value, tree
        elif option.startswith("--"):
            keys = option[2:].removesuffix("+").split(".")
            if keys[-1] == "help":
                keys.pop()
            if not equals and keys and keys[0] in ("model", "data", "trainer"):
                value = next(rest, "")
            leaf: Any = _tree(value)
            for key in reversed(keys):
                leaf = {key: leaf}
            if keys:
                yield "", leaf


def _tree(value: str) -> dict[str, Any] | None:
    """The value of an option as a tree: what is in braces, or a name, which may be a class's."""
    if value.startswith("{"):
        try:
            tree = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            return None
        return tree if isinstance(tree, dict) else None
    return {"class_path": value} if value.replace(".", "_").isidentifier() else None


@dataclass
class _Checker:
    command: str
    options: list[str]
    classes: dict[str, Class | None] = field(default_factory=dict)

    def check(self, source: str, tree: Mapping[str, Any]) -> None:
        self.source = source
        for key, value in tree.items():
            self.expect("", key, self.options)
            root = {"model": MODEL, "data": DATA, "trainer": TRAINER}.get(key)
            if root and isinstance(value, Mapping):
                self.object(key, value, find(root) if key != "model" else None)

    def expect(self, place: str, key: object, known: list[str]) -> None:
        """Refuse a key that is not known; the parser completes options, save those of a class."""
        name = str(key)
        of_class = any(f"{place}.".startswith(f"{other}.") for other in self.classes)
        completed = not self.source and not of_class
        if name in known or (completed and any(word.startswith(name) for word in known)):
            return
        full = f"{place}.{name}" if place else name
        where = f"{self.source}: " if self.source else ""
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        if len(hint) > 200:
            hint = f"{hint[:200]} ..."
        dash = "" if self.source else "--"
        raise UserError(
            f"{where}{dash}{full}: {name!r} is not accepted; {hint} "
            f"(`opd {self.command} --help` shows what is)"
        )

    def object(self, place: str, tree: Mapping[Any, Any], default: Class | None) -> None:
        """Check the arguments of a class, named by the tree, an earlier one or the annotation."""
        if isinstance(path := tree.get("class_path"), str):
            self.forget(place)  # another class may have others inside
            self.classes[place] = find(path)
        owner = self.classes.get(place, default)
        known = owner.options() if owner else None
        if known is None:
            return
        given = tree if not _SUBCLASS & {*tree} else tree.get("init_args")
        for key, value in given.items() if isinstance(given, Mapping) else ():
            if key in _SUBCLASS:
                continue
            key = str(key).removesuffix("+")  # which appends to a list, in files too
            self.expect(place, key, [*known])
            if key in known:
                self.value(f"{place}.{key}", value, known[key])

    def forget(self, place: str) -> None:
        """Drop the classes of a place and of all places inside it."""
        self.classes = {
            k: v for k, v in self.classes.items() if k != place and not k.startswith(f"{place}.")
        }

    def value(self, place: str, value: Any, parameter: Parameter) -> None:
        """Check the trees in the value of a parameter, as far as its annotation tells."""
        if isinstance(value, list):
            # What comes later by this place's name belongs to the last item.
            self.forget(place)
            for i, item in enumerate(value):
                if isinstance(item, Mapping) and "class_path" in item:
                    self.object(f"{place}.{i}", item, None)
                    self.classes[place] = self.classes.get(f"{place}.{i}")
        elif isinstance(value, Mapping) and "class_path" in value:
            self.object(place, value, None)
        elif isinstance(value, Mapping):
            kind, by_name = _class_of(parameter)
            if kind and not (parameter.default or "None").startswith(("None", kind.node.name)):
                kind = None  # the default may be of a subclass
            if by_name:
                for name, item in value.items():
                    if isinstance(item, Mapping):
                        self.object(f"{place}.{name}", item, kind)
            else:
                self.object(place, value, kind)


def _class_of(parameter: Parameter) -> tuple[Class | None, bool]:
    """The one class that an annotation allows, and whether a dict of them; None if unclear."""
    annotation = parameter.annotation
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    parts = list(_union(annotation))
    if len(parts) != 1:
        return None, False
    part, by_name = parts[0], False
    if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "dict":
        by_name = True
        if not isinstance(part.slice, ast.Tuple):
            return None, True
        inner = list(_union(part.slice.elts[-1]))
        if len(inner) != 1:
            return None, True
        part = inner[0]
    if not isinstance(part, ast.Name | ast.Attribute):
        return None, by_name
    return parameter.home.resolve(ast.unparse(part)), by_name


def _union(node: ast.expr | None) -> Iterator[ast.expr]:
    """Members of a union, None left out."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    elif node is not None and not (isinstance(node, ast.Constant) and node.value is None):
        yield node
