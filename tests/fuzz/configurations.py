"""Configurations: the YAML files of configs/lab, changed, and words of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests import processes
from tests.conftest import write_untrained_lab
from tests.fuzz import mutations
from tests.fuzz.kinds import Input, Kind, copied, done
from tests.fuzz.mutations import TWICE
from tests.fuzz.outcome import Outcome
from tests.fuzz.warm import Warm

CONFIGS = Path(__file__).parents[2] / "configs" / "lab"
FILE = "changed.yaml"
# Folders and files that a run makes, where it is told nothing or what the configs say.
WRITTEN = ("runs", "run", "tmp", "lightning_logs", "checkpoints", "lab/scores.db")
# Settings that name such a place.
PLACES = ("save_dir", "name", "version", "dirpath", "default_root_dir", "sub_dir", "filename")
NOT_SAVED = ("ckpt_path", "config", "print_config", "weights_only")  # of a command, not of a run
NEED_OTHERS = ("lightning_opd", "mopd", "exopd_merge")  # the output of another command
INSIDE = ("class_path", "init_args", "dict_kwargs")  # no names of settings


class Configurations(Kind):
    """`opd fit` until training would begin; an accepted value has to be in the saved config."""

    name = "configurations"

    def __init__(self) -> None:
        self._warm: Warm | None = None

    def prepare(self, base: Path) -> None:
        done(processes.call(write_untrained_lab, base / "lab"))
        self._warm = Warm("fit", stop="parsing", cwd=base)

    def make(self, random: Random, base: Path) -> Input:
        sources = sorted(p for p in CONFIGS.glob("*.yaml") if p.stem not in NEED_OTHERS)
        source = random.choice(sources)
        text = source.read_text()
        tree = yaml.safe_load(text)
        way = random.choices(("tree", "file", "word"), (60, 15, 25))[0]
        config = ("fit", "--config", FILE)
        if way == "file":
            content, how = mutations.damaged(random, text.encode())
            # What is left may be whole YAML that lacks a setting.
            names = (FILE, *_keys(tree))
            return Input(f"{source.name}: {how}", {FILE: content}, config, names)
        while True:
            change = mutations.changed(random, tree)
            keys = [str(key) for key in change.path]
            if way == "tree":
                break
            if change.what in ("value", "key renamed", "wrapped") and not {"0", "1"} & {*keys}:
                break
        what = f"{source.name}: {'.'.join(keys)}: {change.what}: {change.value!r:.60}"
        facts: dict[str, Any] = {}
        if change.what == "key twice":
            facts["refuse"] = "a key is set twice"
        if way == "tree":
            text = mutations.as_yaml(change.tree)
            return Input(what, {FILE: text.encode()}, config, _names(change), facts)
        if change.what == "key renamed":
            keys[-1], value = str(change.value), mutations.at(tree, change.path)
        else:
            value = change.value
        word = value if isinstance(value, str) else _flow(value)
        # As a command line can hold it.
        word = word.replace("\0", " ").encode("utf-8", "replace").decode()
        facts["word"] = [keys, word]
        option = f"--{'.'.join(keys)}={word}"
        return Input(what, {FILE: text.encode()}, (*config, option), _names(change), facts)

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        assert self._warm is not None
        copied(base, folder, ("home", "tmp"))
        given.write(folder)
        written = _written(given)
        allowed = (*WRITTEN, *_places(written))
        outcome = self._warm.run(given.words, folder, seconds=self.seconds, allowed=allowed)
        ignored = ""
        if outcome.accepted:
            ignored = given.facts.get("refuse", "") or self._ignored(written, given, folder)
        by_line = any(re.match(rf"{FILE}:\d+: ", error) for error in outcome.errors)
        return replace(outcome, places=() if by_line else given.places, ignored=ignored)

    def _ignored(self, written: list[Any], given: Input, folder: Path) -> str:
        """What of the written settings is not in the config that the run saved."""
        saved = next((p for p in folder.rglob("config.yaml") if "lab" not in p.parts), None)
        if saved is None:
            assert self._warm is not None
            words = (*given.words, "--print_config")
            printed = self._warm.run(words, folder, seconds=self.seconds)
            text = "\n".join(printed.out)
        else:
            text = saved.read_text()
        used = yaml.safe_load(text)
        for tree in written:
            if (found := unused(tree, used)) is not None:
                return found
        return ""

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return dumped.strip().removesuffix("...").strip()


def _names(change: mutations.Mutation) -> tuple[str, ...]:
    """What a refusal may name: the changed key, those around it, or the new value."""
    keys = [key for key in change.path if isinstance(key, str) and key not in INSIDE]
    names = [*keys[-2:]]
    if isinstance(change.value, str):
        quoted = repr(change.value)
        names += [change.value[:20], quoted[1:-1][:20]] if len(change.value) > 2 else [quoted]
    elif change.path[-1] in INSIDE or change.what == "another's value":
        names += [FILE]
    if change.what == "another's value":  # or what it holds
        held = (mutations.at(change.value, path) for path in mutations.places(change.value))
        names += [text for text in held if isinstance(text, str) and len(text) > 2]
    return tuple(name.removeprefix(TWICE) for name in names)


def _keys(tree: Any) -> set[str]:
    """The names of all settings in a tree."""
    return {path[-1] for path in mutations.places(tree) if isinstance(path[-1], str)}


def _written(given: Input) -> list[Any]:
    """The trees of settings that an input holds, the last wins; [] if it is no YAML."""
    try:
        trees = [yaml.safe_load(given.files[FILE].decode("utf-8"))]
    except (ValueError, yaml.YAMLError, RecursionError):
        return []
    if "word" not in given.facts:
        return trees
    keys, word = given.facts["word"]
    try:
        value = yaml.safe_load(word) if word.startswith(("{", "[")) else word
    except (ValueError, yaml.YAMLError, RecursionError):
        value = word
    leaf: Any = value
    for key in reversed(keys):
        leaf = {key: leaf}
    return [leaf]


def _places(trees: list[Any]) -> Iterator[str]:
    """First folders of the paths that the settings tell a run to write to."""
    for tree in trees:
        trainer = tree.get("trainer") if isinstance(tree, Mapping) else None
        logger = trainer.get("logger", True) if isinstance(trainer, Mapping) else True
        if str(logger).lower() in ("false", "none", "null", "[]"):
            yield "config.yaml"  # the run folder is the current one
        for path in mutations.places(tree):
            value = mutations.at(tree, path)
            if path[-1] in PLACES and isinstance(value, str | int | float):
                yield str(value).removeprefix("./").removeprefix("../").split("/")[0] or "."


def unused(written: Any, used: Any, place: str = "") -> str | None:
    """Describe the first written setting that is not among the used ones; None if all are.

    Args:
        written: A tree of settings.
        used: The tree that the program says it uses, defaults included.
        place: Name of both for the answer.
    """
    if isinstance(written, str) and isinstance(used, Mapping | list):
        with suppress(yaml.YAMLError):  # the parser reads a text in brackets too
            written = yaml.safe_load(written)
    if isinstance(written, Mapping):
        if not isinstance(used, Mapping):
            return f"{place}: got {written!r:.80}, used {used!r:.80}" if written else None
        for key, value in written.items():
            name = str(key).removesuffix("+")
            if not place and name in NOT_SAVED:
                continue
            if not place and name == "seed_everything" and value is True:
                continue  # a seed is chosen
            inner = used
            if name not in used and isinstance(used.get("init_args"), Mapping):
                inner = used["init_args"]
            if name == "init_args" and value in (None, {}):
                continue
            if name not in inner:
                return f"{place}.{name}: written as {value!r:.80}, not used"
            if str(key).endswith("+"):
                continue
            if (found := unused(value, inner[name], f"{place}.{name}")) is not None:
                return found
        return None
    if isinstance(written, list):
        if not isinstance(used, list) or len(used) != len(written):
            return f"{place}: got {written!r:.80}, used {used!r:.80}"
        pairs = zip(written, used, strict=True)
        problems = (unused(a, b, f"{place}.{i}") for i, (a, b) in enumerate(pairs))
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(used, Mapping) and "class_path" in used:
        used = used["class_path"]
    if same(written, used) or _is_class(written, used):
        return None
    return f"{place}: got {written!r:.80}, used {used!r:.80}"


def same(written: Any, used: Any) -> bool:
    """Whether two scalars are the same value, as text, number or truth."""
    if written == used or str(written) == str(used):
        return True
    if used is None:
        return written in ("null", "None", "~")
    if isinstance(used, bool):
        return str(written).lower() in (("true", "yes", "1") if used else ("false", "no", "0"))
    if isinstance(used, int | float) and not isinstance(written, Mapping | list):
        try:
            number = float(str(written).replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return bool(yaml.safe_load(str(written)) == used)  # such as 0x10
        return number == used or (math.isnan(number) and math.isnan(used))
    return False


def _is_class(written: Any, used: Any) -> bool:
    """Whether a class is written by a short name."""
    if not isinstance(written, str) or not isinstance(used, str):
        return False
    return written.rpartition(".")[2] == used.rpartition(".")[2] != ""
