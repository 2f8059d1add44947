"""Records of prompt files, and messages when they have changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from opd_lightning.data.mixtures import MixedPrompts
from opd_lightning.data.prompt_files import RECORD, PromptFiles
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.processes import Ranks

ALONE = Ranks(rank=0, world_size=1, sum=lambda n: n, gather=lambda value: [value])


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+1="} for i in range(count)]


def write_jsonl(path: Path, count: int) -> None:
    path.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(count)))


def write_parquet(path: Path, count: int) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows(count)), path)


def write_folder(path: Path, count: int) -> None:
    Dataset.from_list(rows(count)).save_to_disk(str(path))


def read(run: Path, file: Path, *, resumes: bool, ranks: Ranks = ALONE) -> list[str]:
    """The prompts that a run gets."""
    source = PromptSource(str(file))
    files = PromptFiles(run, resumes=resumes)
    files.agree({"data.train": source}, ranks)
    return [prompt.messages[0]["content"] for prompt in source.load(files.size)]


@pytest.mark.parametrize("more", ['{"prompt": "7+7="}\n', '{"prom', "\xff\n"])
def test_a_file_that_grew_is_read_as_far_as_before(
    more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "train.jsonl", tmp_path / "run"
    write_jsonl(file, 3)
    before = read(run, file, resumes=False)
    assert capsys.readouterr().err == ""
    with file.open("a") as opened:
        opened.write(more)
    assert read(run, file, resumes=True) == before
    (line,) = capsys.readouterr().err.splitlines()
    grown = f"opd: data.train: {str(file)!r} has grown by {len(more.encode())} bytes since the run"
    assert line.startswith(grown)
    assert read(run, file, resumes=True) == before  # and again


def test_a_last_line_without_an_end_may_get_one(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "1"}\n{"prompt": "2"}')
    assert read(tmp_path, file, resumes=False) == ["1", "2"]
    with file.open("a") as opened:
        opened.write('\n{"prompt": "3"}\n')
    assert read(tmp_path, file, resumes=True) == ["1", "2"]


def test_a_new_run_takes_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    for count in (3, 5, 2):
        write_jsonl(file, count)
        assert len(read(tmp_path, file, resumes=False)) == count
    (tmp_path / RECORD).unlink()
    assert len(read(tmp_path, file, resumes=True)) == 2  # a checkpoint of another folder


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.parquet", write_parquet), ("folder", write_folder)],
)
def test_any_other_change_is_refused(
    name: str, write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    file, run = tmp_path / name, tmp_path / "run"
    write(file, 4)
    before = read(run, file, resumes=False)
    assert read(run, file, resumes=True) == before
    if name == "a.jsonl":
        file.write_text(file.read_text().replace("2+1", "2+2"))  # of the same size
    else:
        write(file, 5)
    message = rf"data\.train: .*{name}' is not what this run began with \(\d+ bytes, sha256 \w+"
    with pytest.raises(UserError, match=message):
        read(run, file, resumes=True)
    assert len(read(run, file, resumes=False)) == (4 if name == "a.jsonl" else 5)


def test_what_others_keep_in_a_folder_is_no_change(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, 4)
    before = read(tmp_path, folder, resumes=False)
    (folder / "cache-0123.arrow").write_bytes(b"x")
    assert read(tmp_path, folder, resumes=True) == before


def test_all_ranks_read_what_the_first_one_found(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_jsonl(file, 3)
    said: list[Any] = []

    def keep(value: Any) -> list[Any]:
        said.append(value)
        return [said[0]]

    first = Ranks(rank=0, world_size=2, sum=lambda n: n, gather=keep)
    second = Ranks(rank=1, world_size=2, sum=lambda n: n, gather=keep)
    before = read(tmp_path / "run", file, resumes=False, ranks=first)
    with file.open("a") as opened:  # before the second rank looks
        opened.write('{"prompt": "7+7="}\n')
    assert read(tmp_path / "run", file, resumes=False, ranks=second) == before
    assert said[1] == {}


@pytest.mark.parametrize(
    "record",
    [
        "", "[1", "[]", "3", "\ud83d", "[" * 100_000, '{"data.train": 1}',
        '{"data.train": {"size": 1}}',
        '{"data.train": {"size": "1", "sha256": "%s"}}' % ("a" * 64),
        '{"data.train": {"size": 1, "sha256": null}}',
        '{"data.train": {"size": -1, "sha256": "%s"}}' % ("a" * 64),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_record_is_named(record: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_jsonl(file, 3)
    (tmp_path / RECORD).write_bytes(record.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=RECORD) as refused:
        read(tmp_path, file, resumes=True)
    assert "\n" not in str(refused.value)


def test_a_record_that_is_no_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_jsonl(file, 3)
    (tmp_path / RECORD).mkdir()
    with pytest.raises(UserError, match=RECORD):
        read(tmp_path, file, resumes=True)


@pytest.mark.parametrize(
    ("key", "options", "named"),
    [
        ("data.train", {}, "data.train.path"),
        ("data.validation.m", {"data.validation.m": "data.validation.m.prompts"},
         "data.validation.m.prompts.path"),
        ("data.train_like", {"data.train_like": "data.texts.train_like.prompts"},
         "data.texts.train_like.prompts.path"),
    ],
)  # fmt: skip
def test_an_absent_file_is_named_with_its_option(
    key: str, options: dict[str, str], named: str, tmp_path: Path
) -> None:
    absent = PromptSource(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=f"^{re.escape(named)}: no prompt file"):
        PromptFiles().agree({key: absent}, ALONE, options)
    mixed = MixedPrompts({"part": absent})
    with pytest.raises(UserError, match=f"^{re.escape(named[:-5])}.sources.part.path: no prompt"):
        PromptFiles().agree({key: mixed}, ALONE, options)
