"""`opd configs`: every shipped file is listed, shown and copied, and none is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_lightning.commands.configs import main, names
from opd_lightning.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lists_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert len(lines) == len(list(CONFIGS.rglob("*.yaml")))
    assert all(len(line.split()) > 1 for line in lines), "a comment in front of every file"


def test_shows_a_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "lab/opd"])
    assert capsys.readouterr().out == (CONFIGS / "lab" / "opd.yaml").read_text()


def test_copies_to_where_the_documentation_looks(empty: Path) -> None:
    main(["copy", "lab/opd.yaml"])
    main(["copy", "suites"])
    copied = {p.relative_to(empty) for p in empty.rglob("*.yaml")}
    assert copied == {
        Path("configs/lab/opd.yaml"),
        Path("configs/suites/lm_eval.yaml"),
        Path("configs/suites/lm_eval/lab_sums.yaml"),
        Path("configs/suites/lm_eval/lab_choice.yaml"),
    }
    assert all(p.read_bytes() == (CONFIGS.parent / p).read_bytes() for p in copied)


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["lab/opd", "mine.yaml"], "mine.yaml"),
        (["lab/opd", "."], "opd.yaml"),
        (["lab/opd", "new/"], "new/opd.yaml"),
        (["suites/lm_eval", "mine.yaml"], "mine.yaml"),  # a file and a folder have this name
        (["strategy", "mine"], "mine/ddp.yaml"),
    ],
)
def test_copies_to_a_place_of_choice(words: list[str], made: str, empty: Path) -> None:
    main(["copy", *words])
    assert (empty / made).is_file()


def test_overwrites_nothing(empty: Path) -> None:
    (empty / "mine").mkdir()
    (empty / "mine" / "hsdp.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"'mine/hsdp.yaml' exists and differs"):
        main(["copy", "strategy", "mine"])
    assert [p.name for p in (empty / "mine").iterdir()] == ["hsdp.yaml"]
    main(["copy", "strategy", "new"])
    main(["copy", "strategy", "new"])  # the same again is no harm


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lists"], "got 'lists', expected list, show, copy"),
        (["list", "lab"], "expected nothing"),
        (["show"], "expected NAME behind"),
        (["copy"], "expected NAME and optionally DEST"),
        (["show", "lab"], "got 'lab', expected a name"),
        (["copy", "../pyproject"], "expected a name"),
        (["copy", "lab/opd", "/dev/null/opd.yaml"], "cannot write"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(words)
    assert len(str(caught.value)) <= 400


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    main(["copy", "--help"])
    shown = capsys.readouterr().out
    assert shown.count("usage: opd configs list") == 2
