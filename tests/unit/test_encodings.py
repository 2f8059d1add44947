"""Text files and pipes name their encoding: the locale's may lack the characters of a response."""

import ast
from pathlib import Path

import pytest

from tests.sources import parsed

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for name in ("opd_lightning", "callbacks", "experiments")
    for path in (ROOT / name).rglob("*.py")
)
# Functions that take a mode, and its place; of a method, such as `Path.open`, it is the first.
MODES = {"open": 1, "fdopen": 1}
TEXT = {"FileHandler", "RotatingFileHandler"}
METHODS = {"read_text", "write_text"}


def unnamed(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the locale's encoding."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    text = keywords.get("text", keywords.get("universal_newlines"))
    if isinstance(text, ast.Constant) and text.value is True:
        return True
    match call.func:
        case ast.Name(name):
            place = MODES.get(name)
        case ast.Attribute(ast.Name("os"), "open") | ast.Attribute(ast.Name("outputs"), _):
            return False  # a number of a file, and a function of ours
        case ast.Attribute(ast.Name("os"), name):
            place = MODES.get(name)
        case ast.Attribute(_, name):
            if name in METHODS:
                return True
            place = 0 if name == "open" else None
        case _:
            return False
    if name in TEXT:
        return True
    if place is None:
        return False
    mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("path.write_text(page)", True),
        ("(folder / 'a').read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("outputs.write_text('--out', path, text)", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("open(path, 'a')", True),
        ("open(path, mode='wb')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.fdopen(handle, 'w')", True),
        ("os.fdopen(handle, 'rb')", False),
        ("RotatingFileHandler(path, maxBytes=1)", True),
        ("logging.FileHandler(path)", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_calls_without_an_encoding_are_found(code: str, expected: bool) -> None:
    statement = ast.parse(code).body[0]
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert unnamed(statement.value) is expected


def test_every_encoding_is_named() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and unnamed(node)
    ]
    assert found == []
