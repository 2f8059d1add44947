"""Reading of YAML configuration files, stricter than the parser.

Refuses duplicate keys, of which YAML libraries take the last, anchors that contain themselves, and
files that are not text. Imports nothing heavy.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.errors import UserError, cut, reason_of

MAX_BYTES = 2**22  # limit of a file; configurations have about 2**12
MAX_DEPTH = 100  # limit of nesting; configurations have about ten levels
MAX_VALUES = 100_000  # with every alias counted as what it stands for
# YAML can write NUL and half a surrogate pair, but no path or UTF-8 file can hold them.
_NO_TEXT = re.compile("[\\x00\\ud800-\\udfff]")


def read_config(given: str) -> tuple[str, dict[str, Any]]:
    """Read the value of `--config`: a file, or YAML text in place of one.

    Args:
        given: Path of a YAML file; `~` is the home folder. A text with a colon that is no file is
            YAML itself.

    Returns:
        The name for messages, and the settings.

    Raises:
        UserError: It is not a readable file, not YAML, or not a mapping of settings.
    """
    try:
        os.stat(os.path.expanduser(given))
    except (OSError, ValueError) as error:
        if ":" in given:
            return "--config", _settings("--config", parse("--config", given))
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        why = "its name is too long for a file" if too_long else "no such file exists"
        raise UserError(f"--config: got {cut(given, 100)!r}, but {why}") from error
    return given, _settings(given, read_yaml("--config", given))


def read_yaml(option: str, given: str) -> Any:
    """Read a YAML file that an option names.

    Args:
        option: The option, as messages name it.
        given: Path of the file, which exists; `~` is the home folder.

    Raises:
        UserError: It cannot be read, is no YAML, or is refused by `parse`.
    """
    path = Path(os.path.expanduser(given))
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise UserError(f"{option}: got {given!r}, which is {kind}, expected a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{option}: cannot read {given!r}: {reason}; check its mode") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{option}: {given!r} has more than {MAX_BYTES} bytes, expected settings")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{given}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    return parse(given, text)


def check_words(words: Sequence[str]) -> None:
    """Raise UserError if a command line holds bytes that are no text, such as a name in Latin-1."""
    for word in words:
        if found := _NO_TEXT.search(word):
            option = word.partition("=")[0] if word.startswith("--") else "the command line"
            raise UserError(
                f"{_NO_TEXT.sub('?', option)}: holds {found[0]!r}, which is no UTF-8; rename the "
                "file or folder"
            )


def check_configs(words: Sequence[str]) -> None:
    """Read the files that a command line names by `--config`, for the errors of `read_config`."""
    check_words(words)
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            read_config(value if equals else following)


def _settings(source: str, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        got = "nothing" if tree is None or is_blank(tree) else f"a {type(tree).__name__}"
        raise UserError(f"{source}: holds {got}, expected settings, as 'key: value'")
    return tree


def is_blank(value: object) -> bool:
    """Return whether a value is a text without a visible character."""
    return isinstance(value, str) and not value.strip().strip("\ufeff\u200b\u2060").strip()


def parse(source: str, text: str) -> Any:
    """Parse YAML text to plain data.

    Args:
        source: Name of the text in messages.
        text: One YAML document.

    Raises:
        UserError: It is no YAML, repeats a key, contains itself, or is nested too deeply.
    """
    try:
        loader, node = _checked(source, text)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise UserError(f"{where}: is no YAML: {reason}; correct the line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        deep = isinstance(error, RecursionError)
        reason = "values are nested too deeply" if deep else reason_of(error)
        raise UserError(f"{source}: is no usable YAML: {reason}; correct it") from error


def check_text(source: str, text: str) -> None:
    """Refuse what `parse` refuses, except for a text that is no YAML.

    Raises:
        UserError: The text repeats a key, contains itself, or is nested too deeply.
    """
    try:
        _checked(source, text)
    except yaml.YAMLError:
        return
    except RecursionError as error:
        raise UserError(f"{source}: values are nested too deeply; write them flatter") from error


def _checked(source: str, text: str) -> tuple[yaml.SafeLoader, yaml.Node | None]:
    """Return the root of a text's nodes, checked, with its loader."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is not None:
        _check(source, node, {}, ())
    return loader, node


def _check(source: str, node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Check a node and return how many values it stands for, with aliases written out."""
    if id(node) in above:
        raise _refusal(source, node, "an anchor contains an alias of itself; write the value out")
    if len(above) > MAX_DEPTH:
        raise _refusal(source, node, f"values are nested more than {MAX_DEPTH} deep")
    if id(node) in sizes:
        return sizes[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            inner += [key, value]
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                raise _refusal(
                    source,
                    key,
                    f"{key.value!r} is set a second time, first in line {lines[key.value]}; "
                    "keep one of them",
                )
            lines[key.value] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif found := _NO_TEXT.search(node.value):
        raise _refusal(source, node, f"a text holds {found[0]!r}, which none can; take it out")
    size = 1 + sum(_check(source, one, sizes, (*above, id(node))) for one in inner)
    if size > MAX_VALUES:
        raise _refusal(source, node, f"aliases stand for more than {MAX_VALUES} values")
    sizes[id(node)] = size
    return size


def _refusal(source: str, node: yaml.Node, reason: str) -> UserError:
    return UserError(f"{source}:{node.start_mark.line + 1}: {reason}")
