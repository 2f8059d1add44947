"""What jsonargparse reads as YAML goes through the checks of configuration files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.commands import checked_yaml
from opd_lightning.commands.parsers import OneLineParser


@dataclass
class Part:
    size: int = 1
    table: dict[str, int] | None = None
    text: str = ""


def parsed(*words: str) -> Any:
    parser = OneLineParser(prog="opd example")
    parser.add_class_arguments(Part, "part", sub_configs=True)
    return parser.parse_args([*words]).part


@pytest.mark.parametrize("word", ["--part={}/twice.yaml", "--part.table={{a: 1, a: 2}}"])
def test_keys_that_are_set_twice(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twice.yaml").write_text("size: 2\nsize: 3\n")
    with pytest.raises(SystemExit):
        parsed(word.format(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert "is set a second time" in line
    assert "part" in line


def test_texts_that_look_like_yaml_are_texts(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("size: 2\n")
    for text in ("{a: 1, a: 2}", "a: [", "&a [*a]", "[" * 300):
        part = parsed(f"--part={tmp_path}/good.yaml", f"--part.text={text}")
        assert (part.size, part.text) == (2, text)


@pytest.mark.parametrize("word", ["null", "no", "12", "1_0", "1e-3", "0x1f", "2026-01-01", "a/b.c"])
def test_a_single_word_means_what_it_means_in_a_list(word: str) -> None:
    (expected,) = checked_yaml.load(f"[{word}]")
    found = checked_yaml.load(word)
    assert (found, type(found)) == (expected, type(expected))
