"""The fuzzer's own parts: what it makes can be made again, and its judge tells right from wrong."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.fuzz import mutations
from tests.fuzz.configurations import unused
from tests.fuzz.kinds import Input
from tests.fuzz.outcome import Outcome, broken, files, touched
from tests.fuzz.prompt_files import wrong

TREE: dict[str, Any] = {"a": {"b": [1, {"c": "text"}], "d": 0.5}, "e": None, "f": True}
REFUSED = "opd: error: data.train.path: no prompt file at 'x'; give another"


@pytest.mark.parametrize(
    ("outcome", "rule"),
    [
        (Outcome(0), None),
        (Outcome(2, err=[REFUSED]), None),
        (Outcome(1, err=["a warning", REFUSED]), None),
        (Outcome(2, err=[REFUSED], places=("train", "y")), None),
        (Outcome(2, err=[REFUSED], places=("y",)), "unnamed"),
        (Outcome(2, err=[REFUSED, REFUSED]), "lines"),
        (Outcome(2), "lines"),
        (Outcome(0, err=[REFUSED]), "lines"),
        (Outcome(2, err=[f"{REFUSED}\x1b[2J"]), "lines"),
        (Outcome(2, err=[REFUSED + "x" * 400]), "long"),
        (Outcome(1, err=["Traceback (most recent call last):", "KeyError: 1"]), "traceback"),
        (Outcome(3, err=[REFUSED]), "code"),
        (Outcome(-11), "killed"),
        (Outcome(-9, late=True), "hang"),
        (Outcome(0, touched=["home/x"]), "touched"),
        (Outcome(0, ignored="data.sed"), "ignored"),
    ],
)  # fmt: skip
def test_the_judge(outcome: Outcome, rule: str | None) -> None:
    found = broken(outcome)
    assert (found and found[0]) == rule


def test_mutations_are_functions_of_the_seed() -> None:
    content = json.dumps(TREE).encode()
    seen = set()
    for seed in range(200):
        first, second = (mutations.changed(Random(seed), TREE) for _ in range(2))
        assert repr(first) == repr(second)
        assert mutations.damaged(Random(seed), content) == mutations.damaged(Random(seed), content)
        seen.add(repr(first.tree))
    assert len(seen) > 100
    assert json.dumps(TREE).encode() == content


def test_a_key_is_written_twice() -> None:
    path = ("a", f"{mutations.TWICE}d")
    tree = mutations.put(TREE, path, 7)
    assert mutations.as_json(tree).count('"d": ') == 2
    assert mutations.as_yaml(tree).count('d": 7') == 1
    assert yaml.safe_load(mutations.as_yaml(tree))["a"]["d"] == 7


def test_an_input_is_written_and_read() -> None:
    given = Input(
        "x", {"a": b"\xff\x00", "b": b"text\r\n", "c": b"y" * 9999}, ("--x=\ud83d",), ("z",)
    )
    assert Input.from_json(given.to_json()) == given


def test_touched_files_are_seen(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").write_text("a")
    before = files(tmp_path)
    (tmp_path / "here" / "run").mkdir()
    (tmp_path / "here" / "run" / "log").write_text("a")
    (tmp_path / "here" / "runs").write_text("a")
    (tmp_path / "here" / "kept").write_text("ab")
    assert touched(before, files(tmp_path), ["here/run"]) == ["here/kept", "here/runs"]


@pytest.mark.parametrize(
    ("written", "is_used"),
    [
        ({"a": {"b": 1}}, True),
        ({"a": {"b": "1"}}, True),
        ({"a": {"class_path": "A", "init_args": {"b": 1}}}, True),
        ({"a": "A"}, True),
        ({"x": float("nan"), "l": [1, 2]}, True),
        ({"a": {"b": 2}}, False),
        ({"a": {"c": 1}}, False),
        ({"z": 1}, False),
        ({"x": None}, False),
        ({"l": [1]}, False),
    ],
)
def test_a_setting_that_is_not_used_is_seen(written: Any, is_used: bool) -> None:
    used = {
        "a": {"class_path": "m.A", "init_args": {"b": 1}}, "x": float("nan"), "l": [1, 2],
    }  # fmt: skip
    assert (unused(written, used) is None) == is_used


@pytest.mark.parametrize(
    ("line", "is_usable"),
    [
        ('{"prompt": "1+1=", "answer": 2}', True),
        ('{"messages": [{"role": "user", "content": "1+1="}], "answer": "2"}', True),
        ('{"prompt": "1+1=", "answer": 2, "answer": 3}', False),
        ('{"prompt": " ", "answer": 2}', False),
        ('{"prompt": "1+1="}', False),
        ('{"prompt": "1+1=", "answer": NaN}', False),
        ('{"messages": [{"role": "x", "content": "1+1="}], "answer": "2"}', False),
        ("[1]", False),
        ('{"prompt": "1+1=",', False),
    ],
)
def test_a_row_that_cannot_be_used_is_seen(line: str, is_usable: bool) -> None:
    assert (wrong(line.encode(), "OPD") is None) == is_usable
