"""The store of a teacher's scores: exact, whole or not there, and never another teacher's."""

import os
import resource
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.teachers.score_store import Description, RowScores, ScoreStore, row_key
from opd_lightning.teachers.score_writer import PART, ScoreWriter
from tests.processes import call

WHO = Description(teacher="opd-0123456789ab", temperature=1.0, top_k=3)


def some_scores(seed: int, tokens: int = 5) -> RowScores:
    generator = torch.Generator().manual_seed(seed)
    top = torch.randn(tokens, 3, generator=generator)
    ids = torch.randint(100, (tokens, 3), generator=generator, dtype=torch.int32)
    logprobs, entropy = torch.randn(2, tokens, generator=generator)
    return RowScores(logprobs, entropy, ids, top)


def write_endlessly(folder: Path, first: int, last: int) -> None:
    """Write shard after shard of rows `row_key([n], [])` and say so, until it is killed.

    Or until the system ends it in the middle of shard `last`, whose file may not grow that large.
    """
    with ScoreWriter(folder, WHO) as writer:
        for n in count(first):
            writer.add(row_key([n], []), some_scores(n, tokens=50_000))
            if n == last:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
            writer.flush()
            print(n, flush=True)


def write(folder: Path, *rows: int) -> None:
    with ScoreWriter(folder, WHO) as writer:
        for row in rows:
            writer.add(row_key([row], [7]), some_scores(row, tokens=row + 1))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ScoreStore(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("top_k", [0, 2, 3])
def test_what_is_read_is_what_was_written(tmp_path: Path, top_k: int) -> None:
    write(tmp_path, 0, 4)
    write(tmp_path, 2)
    store = ScoreStore(tmp_path)
    assert store.description == WHO
    assert (len(store), len(store.shards)) == (3, 2)
    for row in (0, 2, 4):
        expected, found = some_scores(row, tokens=row + 1), store.read(row_key([row], [7]), top_k)
        assert (found.logprobs == expected.logprobs).all()
        assert (found.entropy == expected.entropy).all()
        assert found.top_ids.tolist() == expected.top_ids[:, :top_k].tolist()
        assert found.top_logprobs.tolist() == expected.top_logprobs[:, :top_k].tolist()
    assert row_key([1], [7]) not in store


def test_a_key_knows_where_the_response_begins() -> None:
    assert len({row_key([1, 2], [3]), row_key([1], [2, 3]), row_key([], [1, 2, 3])}) == 3
    assert len(row_key([1], [2])) == 16


def test_a_killed_writer_leaves_whole_shards_and_another_goes_on(tmp_path: Path) -> None:
    def check(least: int) -> int:
        store = ScoreStore(tmp_path)
        for n in range(len(store)):
            found = store.read(row_key([n], []), 3)
            assert (found.logprobs == some_scores(n, tokens=50_000).logprobs).all()
        assert len(store) >= least
        return len(store)

    said, end = os.pipe()
    with open(said) as lines:
        child = call(write_endlessly, tmp_path, 0, -1, stdout=end)
        os.close(end)
        for _ in range(3):
            lines.readline()
        child.kill()
        child.wait(60)
    whole = check(least=3)
    child = call(write_endlessly, tmp_path, whole, whole + 2)
    assert child.wait(60) == -signal.SIGXFSZ
    assert check(least=0) == whole + 2
    assert (tmp_path / PART).stat().st_size == 1_000_000


def test_an_unfinished_shard_is_no_shard(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / PART).write_bytes(b"half a sha")
    assert len(ScoreStore(tmp_path)) == 1
    write(tmp_path, 2)
    assert len(ScoreStore(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    (shard,) = ScoreStore(tmp_path).shards
    content = bytearray(shard.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
    else:
        del content[-8:]
    shard.write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(f"{str(shard)!r} is damaged")
    assert "delete this file and run `opd cache-teacher` again" in message
    shard.unlink()
    write(tmp_path, 1)
    assert len(ScoreStore(tmp_path)) == 1


def test_what_was_scored_before_an_error_is_kept(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ScoreWriter(tmp_path, WHO) as writer:
            writer.add(row_key([1], [7]), some_scores(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(ScoreStore(tmp_path)) == 1


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with (
        ScoreWriter(tmp_path, WHO),
        pytest.raises(UserError, match="another process is writing to"),
        ScoreWriter(tmp_path, WHO),
    ):
        pass
    write(tmp_path, 1)


def test_two_teachers_do_not_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = replace(WHO, teacher="opd-ba9876543210")
    with (
        pytest.raises(UserError, match="give every teacher a folder of its own"),
        ScoreWriter(tmp_path, other),
    ):
        pass
    write(tmp_path, 2)
    assert len(ScoreStore(tmp_path)) == 2


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "no cached scores in" in refusal(tmp_path)
    write(tmp_path, 1)
    description = tmp_path / "teacher.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 2'))
    assert "is of format 2, expected 1" in refusal(tmp_path)
    description.write_text("{")
    assert "teacher.json' is damaged" in refusal(tmp_path)
