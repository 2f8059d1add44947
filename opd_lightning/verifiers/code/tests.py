"""Tests of programs, as the `answer` of a prompt holds them."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("py", "python", "python3")


@dataclass(frozen=True)
class Tests:
    """Tests of one program.

    Args:
        source: Python statements with asserts that call the program's functions; empty if none.
        cases: Pairs of standard input and expected output.
    """

    source: str = ""
    cases: tuple[tuple[str, str], ...] = ()

    __test__ = False  # not a class of pytest


def parse_tests(answer: str) -> Tests:
    """Read the tests of an answer.

    One of: Python statements; a JSON list of asserts (MBPP's `test_list`); a JSON list of objects
    with `input` and `output` (LiveCodeBench); a JSON object with lists `inputs` and `outputs`, and
    with `fn_name` the arguments and values of a function, or of a method of the class `Solution`
    (APPS, TACO).

    Raises:
        ValueError: The answer has no valid tests; the message has the reason.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return _statements(answer)
    if isinstance(value, dict) and {"inputs", "outputs"} <= value.keys():
        inputs, outputs = value["inputs"], value["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise ValueError("'inputs' and 'outputs' must be lists")
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} 'inputs' for {len(outputs)} 'outputs'")
        if value.get("fn_name"):
            return _calls(str(value["fn_name"]), inputs, outputs)
        return _cases(list(zip(inputs, outputs, strict=True)))
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return _statements("\n".join(value))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if not all({"input", "output"} <= item.keys() for item in value):
            raise ValueError("a test without 'input' or 'output'")
        if any(item.get("testtype", "stdin") != "stdin" for item in value):
            raise ValueError("tests of functions need asserts, or 'fn_name'")
        return _cases([(item["input"], item["output"]) for item in value])
    raise ValueError("expected asserts, or JSON with inputs and outputs")


def program_of(response: str) -> str:
    """Return the last fenced block of Python in a response; without one, the whole response.

    A block without a language counts where none is marked as Python: it may be an output. A block
    may be indented, as in a list.
    """
    blocks: list[tuple[str, str]] = _FENCED.findall(response)
    python = [text for language, text in blocks if language.lower() in _PYTHON]
    found = python or [text for language, text in blocks if not language]
    return dedent(found[-1]) if found else response


def same_output(found: str, expected: str) -> bool:
    """Compare outputs line by line, without spaces at line ends and empty lines at the end."""
    return _lines(found) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _statements(source: str) -> Tests:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are no Python: {str(error)[:80]}") from None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError("the tests have no assert")
    return Tests(source=source)


def _calls(name: str, inputs: list[Any], outputs: list[Any]) -> Tests:
    if not name.isidentifier():
        raise ValueError(f"'fn_name' must be a name, got {name[:40]!r}")
    if not all(isinstance(args, list) for args in inputs):
        raise ValueError("'inputs' must be lists of arguments")
    asserts = (
        f"assert {name}(*{args!r}) == {_expected(value)}"
        for args, value in zip(inputs, outputs, strict=True)
    )
    return Tests(source="\n".join([_OF_JSON, _METHOD.format(name=name), *asserts]))


# Statements before the asserts of `fn_name`. JSON has neither tuples nor keys other than texts.
_OF_JSON = """
class _Json:
    def __init__(self, *values):
        self.values = [self.plain(value) for value in values]

    def __eq__(self, found):
        return self.plain(found) in self.values

    @classmethod
    def plain(cls, value):
        if isinstance(value, (list, tuple)):
            return [cls.plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): cls.plain(item) for key, item in value.items()}
        return value
"""
_METHOD = """
if "{name}" not in globals() and "Solution" in globals():
    {name} = Solution().{name}
"""


def _expected(value: Any) -> str:
    """Return the expression that a function's value is compared with.

    APPS has lists of the one value, in which a function may also return the list.
    """
    if isinstance(value, list) and len(value) == 1:
        return f"_Json({value!r}, {value[0]!r})"
    return f"_Json({value!r})" if isinstance(value, list | dict) else repr(value)


def _cases(pairs: list[tuple[Any, Any]]) -> Tests:
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError("inputs and outputs must be texts")
    if not pairs:
        raise ValueError("there are no tests")
    if not all(expected.strip() for _, expected in pairs):
        raise ValueError("an expected output is empty, which a program without output would meet")
    return Tests(cases=tuple(pairs))
