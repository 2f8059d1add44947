"""Configuration files: what the parser would misread is refused with file and line."""

import os
import re
from pathlib import Path

import pytest

from opd_lightning.commands import config_files
from opd_lightning.commands.config_files import check_configs, read_config
from opd_lightning.errors import UserError


def refusal(given: str) -> str:
    with pytest.raises(UserError) as caught:
        read_config(given)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 400
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"data:\n  seeds: 1\n  seeds: 2\n", ":3: 'seeds' is set a second time, first in line 2"),
        (b"a: 1\nb: {c: 1, c: 2}\n", ":2: 'c' is set a second time, first in line 2"),
        (b"a: 1\n'a': 2\n", ":2: 'a' is set a second time, first in line 1"),
        (b"\ndata: &a\n  x: *a\n", ":2: an anchor contains an alias of itself"),
        (b"a: &a [*a]\n", ":1: an anchor contains an alias of itself"),
        (b"x: " + b"[" * 200 + b"]" * 200, ":1: values are nested more than 100 deep"),
        (b"x: " + b"[" * 1500 + b"]" * 1500, ": is no usable YAML: values are nested too deeply"),
        (b"a: &a [x,x,x,x]\n" + b"\n".join(
            b"%c: &%c [*%c,*%c,*%c,*%c]" % (c, c, c - 1, c - 1, c - 1, c - 1)
            for c in range(ord("b"), ord("m"))
        ), "aliases stand for more than 100000 values"),
        ("# é\na: 1\n".encode("latin-1"), ":1: byte 2 is not UTF-8; save the file as UTF-8"),
        ("a: 1\nb: ü\n".encode("latin-1"), ":2: byte 8 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), ":1: byte 0 is not UTF-8"),
        (b"a: 1\0", "is no usable YAML: unacceptable character"),
        (b'a: 1\nb: "x\\0"\n', r":2: a text holds '\x00', which none can"),
        (b'a: 1\n"\\uD83D": 2\n', r":2: a text holds '\ud83d', which none can"),
        (b"a:\n\tb: 1\n", ":2: is no YAML: while scanning for the next token"),
        (b"", ": holds nothing, expected settings, as 'key: value'"),
        (b"# a comment\n", ": holds nothing,"),
        (b"\xef\xbb\xbf", ": holds nothing,"),
        (b"- a\n", ": holds a list,"),
        (b"words\n", ": holds a str,"),
    ],
)  # fmt: skip
def test_a_file_that_is_refused(text: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    message = refusal(str(path))
    assert message.startswith(str(path))
    assert said in message


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("nowhere.yaml") == "--config: got 'nowhere.yaml', but no such file exists"
    assert "its name is too long" in refusal("x" * 300 + ".yaml")
    assert "which is a folder, expected a YAML file" in refusal(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "which is a pipe or device" in refusal(str(tmp_path / "pipe"))
    (tmp_path / "a.yaml").write_text("a: 1\n")

    def denied(path: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot read" in refusal(str(tmp_path / "a.yaml"))


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**12
    monkeypatch.setattr(config_files, "MAX_BYTES", most)  # large files take seconds
    (tmp_path / "large.yaml").write_text("a: 1\n# " + "x" * (most - 8) + "\n")
    assert read_config(str(tmp_path / "large.yaml"))[1] == {"a": 1}
    os.truncate(tmp_path / "large.yaml", most + 1)
    assert f"more than {most} bytes" in refusal(str(tmp_path / "large.yaml"))


def test_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeffbase: &b {x: 1, y: 2}\nother:\n  <<: *b\n  x: 3\nagain: [*b, *b]\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    name, tree = read_config("~/a.yaml")
    assert name == "~/a.yaml"
    both = {"x": 1, "y": 2}
    assert tree == {"base": both, "other": {"x": 3, "y": 2}, "again": [both, both]}
    assert read_config("{data: {prompts_per_step: 2}}")[1] == {"data": {"prompts_per_step": 2}}
    with pytest.raises(UserError, match=re.escape("--config:1: 'a' is set a second time")):
        read_config("{a: 1, a: 2}")


@pytest.mark.parametrize("form", [["--config", "{}"], ["-c", "{}"], ["--config={}"]])
def test_files_of_a_command_line_are_read(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "good").write_text("a: 1")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "twice").write_text("a: 1\na: 2")

    def check(name: str) -> None:
        check_configs(["build", *(word.format(tmp_path / name) for word in form), "--more"])

    check("good")
    for name in ("pipe", "twice", "missing"):
        with pytest.raises(UserError):
            check(name)
