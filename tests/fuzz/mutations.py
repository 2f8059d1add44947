"""Seeded mutations of bytes, texts, numbers and trees of JSON or YAML.

All take a `random.Random` and change nothing in place, so that a mutation is a function of its
seed. What was done is told in words, for tables and kept cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import yaml

Path = tuple[str | int, ...]

TWICE = "\0twice:"  # before a key: written without it, beside the key itself
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 10**3, 2**31, 2**32, 2**63, 10**25, 10**400, -(2**63), 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), "nan", ".nan", "inf", "1e3", "1_000", "0x10", "010",
    "1,5", "٣", True,
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "\n", "\ufeff", "\u200b", "null", "None", "~", "true", "yes", "no", "{}", "[]", "{",
    "}", "[", ":", "- a", "a: b", "#", "%s %d {x}", "${HOME}", "../x", "./", "/", "nowhere",
    "a/b/c", "é", "\u202e", "日本語", "🙂", "\x00", "\x07", "\x1b[31m", "\r\n", "\ud83d", "x" * 300,
    "x" * 5000, "\\", "'", '"', "!!python/object:os.system", "*a", "&a", "<|end|>", "os.system",
    "torch.nn.Linear", "builtins.print", "2026-01-01", "1:30",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [None], [1, "a"], [[]], {"a": 1}, {"": None}, {"class_path": "x"},
    {"class_path": "torch.nn.Linear", "init_args": {}}, {"class_path": None}, {"init_args": {}},
)  # fmt: skip


class Mutation(NamedTuple):
    """A changed tree.

    Attributes:
        tree: The whole new tree.
        path: Keys and indices to what was changed.
        what: What was done, in a word or two.
        value: The new value, or key; None if something was taken away.
    """

    tree: Any
    path: Path
    what: str
    value: Any = None

    @property
    def told(self) -> str:
        """Where, what and to what, in a line."""
        return f"{'.'.join(map(str, self.path))}: {self.what}: {shown(self.value)}"


def one(random: Random, old: Any) -> Any:
    """Return a hostile value in place of an old one."""
    draw = random.random()
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    if is_number and draw < 0.6:
        return random.choice((*NUMBERS, old * -1, old * 1000, old + 0.5, str(old)))
    if isinstance(old, str) and draw < 0.6:
        return text(random, old)
    if draw < 0.75:
        return random.choice(OTHERS)
    if draw < 0.78:
        return nested(random.choice((5, 99, 120)), random.random() < 0.5)
    return random.choice((*NUMBERS, *TEXTS))


def text(random: Random, old: str) -> str:
    """Return another text, similar to the old one or a hostile one."""
    place = random.randrange(len(old) + 1)
    return random.choice(
        (
            lambda: random.choice(TEXTS),
            lambda: random.choice(TEXTS),
            lambda: old[:place] + random.choice(TEXTS) + old[place:],
            lambda: old[:place],
            lambda: old[:place] + old[place + 1 :],
            lambda: old + old,
            lambda: old.upper(),
            lambda: f" {old} ",
            lambda: old[::-1],
            lambda: old[:place] + chr(random.randrange(32, 0x2FF)) + old[place:],
        )
    )()


def shown(value: Any) -> str:
    """Return a value in at most 60 characters."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "nested values"


def nested(depth: int, lists: bool = True) -> Any:
    """Return lists in lists, or tables in tables."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


# Trees ----------------------------------------------------------------------------------------


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the paths of all values in a tree, itself left out."""
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def descent(random: Random, tree: Any) -> Path:
    """Choose the path of a value key by key, so that long lists do not have most of the chances."""
    path: Path = ()
    while isinstance(tree, Mapping | list) and len(tree) and (not path or random.random() < 0.8):
        key = random.choice(list(tree) if isinstance(tree, Mapping) else range(len(tree)))
        path, tree = (*path, key), tree[key]
    return path


def at(tree: Any, path: Path) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def edited(tree: Any, path: Path, edit: Callable[[Any], Any]) -> Any:
    """Return a copy of the tree with `edit` of the value at the path in its place."""
    if not path:
        return edit(tree)
    copy: Any = dict(tree) if isinstance(tree, Mapping) else list(tree)
    copy[path[0]] = edited(copy[path[0]], path[1:], edit)
    return copy


def put(tree: Any, path: Path, value: Any) -> Any:
    """Return a copy of the tree with a value at the path, whose last key may be new."""

    def with_value(holder: Any) -> Any:
        copy: Any = dict(holder) if isinstance(holder, Mapping) else list(holder)
        copy[path[-1]] = value
        return copy

    return edited(tree, path[:-1], with_value)


def without(tree: Any, path: Path) -> Any:
    """Return a copy of the tree without the value at the path."""

    def left(holder: Any) -> Any:
        if isinstance(holder, Mapping):
            return {key: value for key, value in holder.items() if key != path[-1]}
        return [value for i, value in enumerate(holder) if i != path[-1]]

    return edited(tree, path[:-1], left)


def renamed(tree: Any, path: Path, key: str) -> Any:
    """Return a copy of the tree in which the last key of the path has another name."""
    return edited(
        tree,
        path[:-1],
        lambda holder: {key if k == path[-1] else k: value for k, value in holder.items()},
    )


def changed(random: Random, tree: Any, among: Sequence[Path] | None = None) -> Mutation:
    """Change a tree in one place.

    Args:
        random: Decides everything.
        tree: Plain data.
        among: Paths to choose from; by default those of all values.
    """
    path = random.choice(among or [*places(tree)])
    old = at(tree, path)
    in_table = isinstance(path[-1], str)
    kind = random.choices(
        ("value", "key", "added", "removed", "twice", "swapped", "wrapped"), (55, 10, 7, 7, 7, 7, 7)
    )[0]
    if kind == "key" and in_table:
        key = text(random, str(path[-1]))
        return Mutation(renamed(tree, path, key), path, "key renamed", key)
    if kind == "added" and in_table:
        key = random.choice((text(random, str(path[-1])), "unknown", "config", "class_path"))
        return Mutation(put(tree, (*path[:-1], key), one(random, old)), path, "key added", key)
    if kind == "removed":
        return Mutation(without(tree, path), path, "removed")
    if kind == "twice" and in_table:
        again = (*path[:-1], f"{TWICE}{path[-1]}")
        return Mutation(put(tree, again, random.choice((old, 1))), path, "key twice", old)
    if kind == "swapped":
        other = random.choice([*places(tree)])
        return Mutation(put(tree, path, at(tree, other)), path, "another's value", at(tree, other))
    if kind == "wrapped":
        value = random.choice(([old], {"a": old}, [old, old], str(old)))
        return Mutation(put(tree, path, value), path, "wrapped", value)
    value = one(random, old)
    return Mutation(put(tree, path, value), path, "value", value)


def as_json(tree: Any) -> str:
    """Return the tree as JSON; keys marked by `TWICE` repeat another."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 10_000)  # it may be nested as deeply as that
    try:
        return json.dumps(tree).replace(json.dumps(TWICE)[1:-1], "")
    finally:
        sys.setrecursionlimit(limit)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(tree: Any) -> str:
    """Return the tree as YAML; keys marked by `TWICE` repeat another."""
    dumped: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=10**6)
    return dumped.replace('"\\0twice:', '"')


# Bytes ----------------------------------------------------------------------------------------


def damaged(random: Random, content: bytes) -> tuple[bytes, str]:
    """Return damaged bytes, and how."""
    size = len(content)
    place, length = random.randrange(size + 1), random.choice((1, 2, 8, 64, 1000))
    ways: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("cut", lambda: content[:place]),
        ("cut at its end", lambda: content[: max(0, size - length)]),
        ("begun late", lambda: content[length:]),
        ("without a part", lambda: content[:place] + content[place + length :]),
        ("with a part twice", lambda: content[: place + length] + content[place:]),
        ("doubled", lambda: content + content),
        ("halves swapped", lambda: content[place:] + content[:place]),
        ("empty", lambda: b""),
        ("zeros", lambda: bytes(size)),
        ("zeros inside", lambda: content[:place] + bytes(length) + content[place + length :]),
        ("random bytes", lambda: random.randbytes(min(size, 200))),
        ("bits flipped", lambda: _flipped(random, content)),
        ("bytes replaced", lambda: content[:place] + random.randbytes(2) + content[place + 2 :]),
        ("a byte order mark", lambda: b"\xef\xbb\xbf" + content),
        ("UTF-16", lambda: content.decode("utf-8", "replace").encode("utf-16")),
        ("Latin-1 inside", lambda: content[:place] + b"\xe9\xff" + content[place:]),
        ("control characters", lambda: content[:place] + b"\x00\x1b[2J\x07" + content[place:]),
        ("CRLF", lambda: content.replace(b"\n", b"\r\n")),
        ("CR", lambda: content.replace(b"\n", b"\r")),
        ("a very long line", lambda: content[:place] + b"x" * 100_000 + content[place:]),
        ("brackets", lambda: content[:place] + b"[" * 3000 + content[place:]),
        ("text", lambda: content[:place] + random.choice(_TEXT_BYTES) + content[place:]),
    )
    what, way = random.choice(ways)
    return way(), what


_TEXT_BYTES = tuple(text.encode("utf-8", "surrogatepass") for text in TEXTS)


def _flipped(random: Random, content: bytes) -> bytes:
    flipped = bytearray(content)
    for _ in range(random.choice((1, 1, 4, 30)) if flipped else 0):
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)
