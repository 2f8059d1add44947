"""An error is one printable line, whatever it quotes."""

import pytest

from opd_lightning.errors import report


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("data.train.path: got 'é 日本'", "data.train.path: got 'é 日本'"),
        ("a\nb\t c", "a b c"),
        ("\x1b[2J \u202eab \ufeff \ud83d \0", r"\x1b[2J \u202eab \ufeff \ud83d \x00"),
    ],
)
def test_what_is_printed(message: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(message)
    assert capsys.readouterr().err == f"opd: error: {line}\n"


@pytest.mark.parametrize("filler", ["x" * 5000, "word " * 1000, "\x1b" * 5000])
def test_a_long_line_keeps_its_ends(filler: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(f"run.yaml: data.train.path: {filler}; name another file")
    (line,) = capsys.readouterr().err.splitlines()
    line = line.removeprefix("opd: error: ")
    assert len(line) <= 400
    assert line.startswith("run.yaml: data.train.path: ")
    assert line.endswith("name another file")
