"""Files and folders to write: refused before any work, and whole or untouched afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from opd_lightning.cli import one_line_errors
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.run.outputs import (
    check_file,
    check_folder,
    check_run_files,
    write_text,
    writing_folder,
)

Check = Callable[[str, Path], None]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def state(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (check_file, "folder"),
        (check_file, "nowhere/new"),
        (check_file, "file/new"),
        (check_file, "x" * 300),
        (check_folder, "file"),
        (check_folder, "file/new"),
        (check_folder, "pipe"),
        (check_folder, "x" * 300),
    ],
)
def test_what_cannot_be_written_is_refused(check: Check, name: str, here: Path) -> None:
    before = state(here)
    with pytest.raises(UserError) as refused:
        check("--out", here / name)
    line = str(refused.value)
    assert line.startswith("--out: got ")
    assert "\n" not in line
    assert len(line) <= 400
    assert state(here) == before


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (check_file, "file"),
        (check_file, "folder/new"),
        (check_file, "pipe"),
        (check_folder, "folder"),
        (check_folder, "folder/new/newer"),
    ],
)
def test_what_can_be_written_is_left_as_it_is(
    check: Check, name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(here)
    check("--out", here / name)
    assert state(here) == before
    assert (here / "file").read_text() == "kept"
    monkeypatch.setattr(os, "access", lambda *_: False)  # these tests may run as root
    with pytest.raises(UserError, match="read-only"):
        check("--out", here / name)


def test_a_file_is_replaced_as_a_whole(here: Path) -> None:
    link = here / "link"
    link.symlink_to("file")
    write_text("--out", link, "new")
    assert link.is_symlink()
    assert (here / "file").read_text() == "new"
    draft = here / ".file.writing"
    draft.mkdir()  # which no file can take the place of
    with pytest.raises(RunStoppedError, match=r"--out: could not write"):
        write_text("--out", here / "file", "newer")
    assert (here / "file").read_text() == "new"
    with pytest.raises(RunStoppedError, match="No space left"):
        write_text("--out", Path("/dev/full"), "text")
    write_text("--out", Path("/dev/null"), "text")


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunStoppedError),
        (SafetensorError("I/O error: No space left on device"), RunStoppedError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_a_folder_is_whole_or_empty(
    error: BaseException, expected: type[BaseException], is_new: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()

    def write() -> None:
        with writing_folder("--out", out):
            (out / "deep").mkdir(parents=True)
            (out / "model").write_text("half")
            raise error

    with pytest.raises(expected):
        write()
    assert out.exists() is not is_new
    assert state(tmp_path) == ([] if is_new else [str(out)])


def test_a_disk_that_refuses_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def run(error: OSError) -> None:
        with one_line_errors():
            raise error

    with pytest.raises(SystemExit) as ended:
        run(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file"))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: error: '/some/file': No space left on device")
    with pytest.raises(FileNotFoundError):  # may be a bug
        run(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x"))


@pytest.mark.parametrize("name", ["folder", "pipe", "device", "link"])
def test_a_run_writes_its_files_to_files_alone(name: str, here: Path) -> None:
    (here / "device").symlink_to("/dev/null")
    (here / "link").symlink_to("file")
    check_run_files(here, ["file", "new"])
    check_run_files(here / "nowhere", ["file"])
    with pytest.raises(UserError, match=rf"run folder: got .*{name}'"):
        check_run_files(here, ["file", name])
