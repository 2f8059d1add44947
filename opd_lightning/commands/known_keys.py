"""Refuse misspelt keys and impossible values of YAML files and options before the heavy imports.

The parser refuses most of them too, but only after Lightning is imported. Keys and values that the
source code does not decide are left to the parser.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml

from opd_lightning.commands.callback_names import INSTALLED, SHORT, is_our_package
from opd_lightning.commands.config_files import check_words, is_blank, parse, read_config, read_yaml
from opd_lightning.commands.known_values import Word, kinds_of, members, problem, shown, words_of
from opd_lightning.commands.signatures import Class, Parameter, find, load, parameters
from opd_lightning.errors import UserError, cut

TRAINER = "opd_lightning.commands.trainer.Trainer"
DATA = "opd_lightning.run.datamodule.RolloutDataModule"
MODEL = "opd_lightning.training.base.DistillationModule"
SECTIONS = {"model": MODEL, "data": DATA, "trainer": TRAINER}

# Packages whose source is searched for class names, and modules that export classes.
OURS = ("opd_lightning", SHORT, INSTALLED)
EXPORTS = (
    *(f"opd_lightning.{r}" for r in ("methods", "rules", "rollouts", "teachers", "verifiers")),
    SHORT,
)

# Options of every command, besides the parameters of its method.
COMMON = ("config", "help", "print_config", "seed_everything", "model", "data", "trainer")
# Parameters of the method that are no options: set by Lightning, or unused.
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
    """Raise UserError at the first key or value that no class of the program accepts."""
    check_words(words)
    trainer = find(TRAINER)
    method = trainer.method(command.replace("-", "_")) if trainer else None
    if method is None:
        return
    own = {k: p for k, p in parameters(*method).items() if k not in NOT_OPTIONS}
    seed = Parameter(ast.parse("bool | int", mode="eval").body, "0", "", method[1].home)
    checker = _Checker(command, {**dict.fromkeys(COMMON), **own, "seed_everything": seed})
    for source, tree in _given(words):
        checker.check(source, tree)


def _given(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each YAML file and option of a command line, in order: (source, tree of keys)."""
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            yield read_config(value if equals else next(rest, ""))
        elif option.startswith("--"):
            keys = option[2:].removesuffix("+").split(".")
            asks_help = keys[-1] == "help"
            if asks_help:
                keys.pop()
            given = bool(equals)
            if not equals and keys and keys[0] in ("model", "data", "trainer"):
                value, given = next(rest, ""), True
            leaf: Any = _leaf(option, value) if given and not asks_help else _Unknown()
            for key in reversed(keys):
                leaf = {key: leaf}
            if keys:
                yield "", leaf


class _Unknown:
    """Placeholder of a value that only the parser can check."""


def _leaf(option: str, value: str) -> Any:
    """Parse the value of an option: in braces or brackets as YAML data, else as a `Word`."""
    if not value.startswith(("{", "[")):
        return Word(value)
    try:
        yaml.compose(value, yaml.SafeLoader)
    except (ValueError, yaml.YAMLError, RecursionError):
        return _Unknown()  # may be text that begins with a bracket
    return parse(option, value)


@dataclass
class _Checker:
    command: str
    options: dict[str, Parameter | None]
    classes: dict[str, Class | None] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)  # files that include the current one

    def check(self, source: str, tree: Mapping[str, Any]) -> None:
        self.source = source
        for key, value in tree.items():
            self.expect("", key, [*self.options])
            if key == "config" and source and value is not None:
                self.refuse(key, "a file cannot name another; give --config once for each")
            if key in SECTIONS:
                self.section(key, value)
            elif (option := self.options[key]) is not None:
                self.expect_value(key, value, option)
                if key == "seed_everything":
                    self.expect_seed(value)

    def section(self, key: str, value: Any) -> None:
        """Check the tree of the model, the data or the trainer."""
        if (file := self.file_of(key, value)) is not None:
            with self.reading(key, file) as value:
                self.section(key, value)
            return
        if isinstance(value, str) and key == "model" and is_name(value):
            value = {"class_path": str(value)}
        if isinstance(value, Mapping):
            if key == "data" and "seed" in value:
                self.refuse("data.seed", "is seed_everything's; set that instead")
            self.object(key, value, find(SECTIONS[key]) if key != "model" else None)
        elif not isinstance(value, _Unknown | str) or is_blank(value):
            kind = "a method (class_path and init_args)" if key == "model" else "a table of options"
            self.refuse(key, f"got {shown(value)}, expected {kind}")

    def file_of(self, place: str, value: Any) -> str | None:
        """Return the path of the file that a text names in place of settings; None if it cannot."""
        if isinstance(value, str) and not is_blank(value):
            # First relative to the file that names it.
            for folder in (os.path.dirname(self.source), ""):
                path = os.path.join(folder, os.path.expanduser(value))
                if os.path.exists(path) and not os.path.isdir(path):
                    return path
            if value.endswith((".yaml", ".yml")):  # the parser would take it for a class
                self.refuse(place, f"got {shown(value)}, but no such file exists")
        return None

    @contextmanager
    def reading(self, place: str, file: str) -> Iterator[Any]:
        """Read a file of settings, which errors name meanwhile; a text in it is left alone."""
        if file in self.files:
            self.refuse(place, f"{file!r} names itself; write the settings out")
        source, self.source = self.source, file
        self.files.append(file)
        value = read_yaml(f"--{place}", file)
        yield _Unknown() if isinstance(value, str) else value
        self.files.pop()
        self.source = source

    def expect(self, place: str, key: object, known: list[str]) -> None:
        """Refuse a key that is not known. Abbreviations are not accepted."""
        name = str(key)
        if name in known:
            return
        near = get_close_matches(name, known, n=1)
        begun = [word for word in known if word.startswith(name)] if len(name) > 1 else []
        near = begun[:1] if len(begun) == 1 else near
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        if len(hint) > 200:
            hint = f"{hint[:200]} ..."
        name = cut(name, 60)
        full = f"{place}.{name}" if place else name
        self.refuse(
            full,
            f"{name!r} is not accepted; {hint} (`opd {self.command} --help` shows what is)",
        )

    def expect_value(self, place: str, value: Any, parameter: Parameter) -> None:
        """Refuse a value that the parameter's type does not allow."""
        if not isinstance(value, _Unknown) and (found := problem(value, parameter)) is not None:
            self.refuse(place, found)

    def expect_seed(self, value: Any) -> None:
        try:
            seed = int(value)
        except OverflowError:  # infinity
            seed = 2**63
        except (TypeError, ValueError):
            return
        if not 0 <= seed < 2**32:
            text = shown(Word(seed)) if abs(seed) < 10**12 else "a number of many digits"
            self.refuse("seed_everything", f"got {text}, expected 0 to {2**32 - 1}")

    def expect_itself(self, place: str, path: Any, parameter: Parameter) -> None:
        """Refuse another class where a table of options is expected, which has no subclasses."""
        kind, by_name = _class_of(parameter)
        if kind is None or by_name or not kind.is_dataclass or kind.node.bases:
            return
        if isinstance(path, str) and path.rpartition(".")[2] != kind.node.name:
            self.refuse(place, f"got the class {path}, expected the options of {kind.node.name}")

    def refuse(self, place: str, problem: str) -> NoReturn:
        where = f"{self.source}: " if self.source else ""
        dash = "" if self.source else "--"
        raise UserError(f"{where}{dash}{place}: {problem}")

    def object(self, place: str, tree: Mapping[Any, Any], default: Class | None) -> None:
        """Check the arguments of a class, named by the tree, an earlier one or the annotation."""
        path = tree.get("class_path")
        if "class_path" in tree and not isinstance(path, str | _Unknown):
            self.refuse(f"{place}.class_path", f"got {shown(path)}, expected the name of a class")
        if isinstance(path, str):
            if (found := unknown_class(path)) is not None:
                self.refuse(place, found)
            self.drop_classes(place)  # arguments of another class may have other classes
            self.classes[place] = find(path)
            beside = [key for key in tree if key not in _SUBCLASS]
            if beside:
                self.refuse(
                    f"{place}.{beside[0]}",
                    f"stands beside class_path; put {', '.join(map(str, beside))} under init_args",
                )
        owner = self.classes.get(place, default)
        known = owner.options() if owner else None
        if known is None:
            return
        given = tree if not _SUBCLASS & {*tree} else tree.get("init_args")
        for key, value in given.items() if isinstance(given, Mapping) else ():
            key = str(key).removesuffix("+")  # "+" appends to a list, in files too
            self.expect(place, key, [*known])
            self.value(f"{place}.{key}", value, known[key])

    def drop_classes(self, place: str) -> None:
        """Drop the recorded classes of a place and of all places inside it."""
        self.classes = {
            k: v for k, v in self.classes.items() if k != place and not k.startswith(f"{place}.")
        }

    def value(self, place: str, value: Any, parameter: Parameter) -> None:
        """Check the value of a parameter and nested trees, as far as its annotation allows."""
        self.expect_value(place, value, parameter)
        if takes_settings(parameter) and (file := self.file_of(place, value)) is not None:
            with self.reading(place, file) as value:
                self.value(place, value, parameter)
            return
        if isinstance(value, str) and is_name(value) and takes_class(parameter):
            value = {"class_path": str(value)}
        if isinstance(value, list):
            # Later options with the name of this place set the last item.
            self.drop_classes(place)
            for i, item in enumerate(value):
                if isinstance(item, Mapping) and "class_path" in item:
                    self.object(f"{place}.{i}", item, None)
                    self.classes[place] = self.classes.get(f"{place}.{i}")
        elif isinstance(value, Mapping) and "class_path" in value:
            self.expect_itself(place, value["class_path"], parameter)
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


def unknown_class(path: str) -> str | None:
    """Return an error for a class path into `OURS` that does not exist; else None."""
    owner, _, name = path.rpartition(".")
    top = owner.partition(".")[0]
    package = load(top) if top in OURS else None
    if package is None or not is_our_package(top, package.path):
        return None
    module = load(owner)
    if find(path) is not None or (module is not None and module.defines(name)):
        return None
    if module is None and (outer := find(owner)) is not None and outer.node.name:
        return None  # a class inside a class
    exported = [f"{place}.{one}" for place in EXPORTS for one in _names(place)]
    beside = [f"{owner}.{one}" for one in _names(owner)]
    for candidates in (beside, exported):
        near = get_close_matches(name, [one.rpartition(".")[2] for one in candidates], n=1)
        if near:
            full = next(one for one in candidates if one.endswith(f".{near[0]}"))
            return f"there is no class {cut(path, 100)!r}; did you mean {full!r}?"
    what = "module" if module is None else "class"
    missing = owner if module is None else path
    return f"there is no {what} {cut(missing, 100)!r}; correct the name"


def _names(name: str) -> list[str]:
    """Return the names of the classes that a module defines or exports."""
    module = load(name)
    known = {**module.imported, **module.definitions} if module else {}
    return [word for word in known if word[:1].isupper()]


def is_name(text: str) -> bool:
    """Return whether a text may be the import path of a class."""
    return text.replace(".", "_").isidentifier() and text not in ("null", "None")


def takes_class(parameter: Parameter) -> bool:
    """Return whether a text for the parameter can only be the name of a class."""
    words = words_of(parameter)
    if "str" in words or words == {"Literal"}:  # Literal may be the key type of a dict of classes
        return False
    kinds = kinds_of(parameter)
    if kinds is None:
        return parameter.annotation is None
    return "class" in kinds.names and "str" not in kinds.names


def takes_settings(parameter: Parameter) -> bool:
    """Return whether the parser reads the file that a text for the parameter names."""
    kinds = None if "str" in words_of(parameter) else kinds_of(parameter)
    return kinds is not None and bool(kinds.names & {"class", "list"})


def _class_of(parameter: Parameter) -> tuple[Class | None, bool]:
    """Return the class that an annotation allows (None if unclear), and whether a dict of it."""
    parts = [pair for pair in members(parameter) if not isinstance(pair[0], ast.Constant)]
    if len(parts) != 1:
        return None, False
    ((part, home),) = parts
    if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "dict":
        if not isinstance(part.slice, ast.Tuple):
            return None, True
        inner = replace(parameter, annotation=part.slice.elts[-1], home=home)
        kind, by_name = _class_of(inner)
        return (None if by_name else kind), True
    if not isinstance(part, ast.Name | ast.Attribute):
        return None, False
    return home.resolve(ast.unparse(part)), False
