"""Checkpoints of several processes: they fail and choose together, and may change in number."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.writing import MANIFEST, META, sum_of
from opd_lightning.errors import UserError
from tests.processes import run_ranks

Seen = dict[str, Any]
QUICK = "ddp,folder"
SLOW = pytest.param("file", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def runs(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """Return a function that runs the script for ways.

    It returns the observations of every process by phase and rank, and stderr of each phase.
    """

    @cache
    def run(ways: str) -> Seen:
        folder = tmp_path_factory.mktemp("checkpoints")
        found: Seen = {"shards": folder / "toy" / "folder" / "step=4.ckpt"}
        for phase in ("start", "middle", "end"):
            ranks = run_ranks(
                "tests.integration.checkpoint_ranks",
                *(phase, str(folder), ways),
                count=2 if phase == "middle" else 1,
                cwd=untrained_lab,
                timeout=400,
            )
            lines = [line for rank in ranks for line in rank.stderr.splitlines()]
            found[f"{phase} said"] = [line for line in lines if line.startswith("opd: ")]
        for file in folder.glob("*.json"):
            found[file.stem] = json.loads(file.read_text())
        return found

    return run


@pytest.fixture
def seen(request: pytest.FixtureRequest, runs: Callable[[str], Seen]) -> Seen:
    """Return what was seen in the way of a test, or in the quick ones."""
    way = getattr(request.node, "callspec", None) and request.node.callspec.params.get("way")
    return runs("file" if way == "file" else QUICK)


@pytest.mark.parametrize("way", ["ddp", SLOW, "folder"])
def test_no_room_on_one_rank_is_known_to_all(seen: Seen, way: str) -> None:
    for rank in (0, 1):
        said = [
            full[rank][0] for full in (seen[f"middle-{r}"]["faults"][way]["full"] for r in (0, 1))
        ]
        if rank == 1 and way != "folder":
            assert said == ["nothing", "nothing"], "rank 1 writes nothing"
            continue
        for line in said:
            assert line.startswith("CheckpointError: step 2: ")
            assert f"last.ckpt' (rank {rank}): File too large" in line
        names = seen["middle-0"]["faults"][way]["full"][rank][1]
        assert names == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]


@pytest.mark.parametrize("way", ["ddp", SLOW, "folder"])
def test_all_ranks_pass_over_what_one_finds_damaged(seen: Seen, way: str) -> None:
    for rank in (0, 1):
        first, second, third = seen[f"middle-{rank}"]["faults"][way]["losses"]
        assert [len(part) for part in (first, second, third)] == [2, 1, 2]
        assert third[0] == second[0], "step 3 is made again, from the state of step 2"
    passed = [x for x in seen["middle said"] if f"/{way}/" in x and "passed over" in x]
    assert len(passed) == 2, "rank 0 alone speaks"
    assert {name for line in passed for name in ("last", "step=3") if name in line} == {
        "last",
        "step=3",
    }


@pytest.mark.parametrize("way", ["ddp", SLOW, "folder"])
def test_another_model_is_refused_on_all_ranks(seen: Seen, way: str) -> None:
    for rank in (0, 1):
        assert "is of shape [8] there" in seen[f"middle-{rank}"]["faults"][way]["another model"]


def test_a_folder_of_shards_is_refused_by_one_process(seen: Seen) -> None:
    assert "is a folder of shards, which trainer.strategy Single" in seen["end-0"]["shards"]


@pytest.mark.parametrize("way", ["ddp", SLOW])
def test_one_process_then_two_then_one(seen: Seen, way: str) -> None:
    losses = [loss for phase in ("start", "middle", "end") for loss in seen[f"{phase}-0"][way]]
    assert losses == pytest.approx(seen["start-0"]["unbroken"], abs=1e-4)
    assert len(losses) == 6
    for phase, numbers in (("middle", "1 process wrote"), ("end", "2 processes wrote")):
        assert len([line for line in seen[f"{phase} said"] if numbers in line]) == 1


class Bomb:
    """Object that runs a program when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def with_bomb(shards: Path, file: str, bomb: Bomb) -> None:
    """Put it where torch would unpickle it; the checksums are right."""
    if file == ".metadata":
        (shards / file).write_bytes(pickle.dumps(bomb))
    elif file == META:
        torch.save({**torch.load(shards / META, weights_only=True), "more": bomb}, shards / META)
    else:  # in the place of a setting of the optimiser
        metadata = pickle.loads((shards / ".metadata").read_bytes())
        (index,) = (i for i in metadata.storage_data if i.fqn == "optimizer_0.param_groups.0.lr")
        place = metadata.storage_data[index]
        with (shards / place.relative_path).open("r+b") as stream:
            place.offset = stream.seek(0, os.SEEK_END)
            torch.save(bomb, stream)
            place.length = stream.tell() - place.offset
        (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    names = [path.name for path in shards.iterdir() if path.name != MANIFEST]
    sums = {name: sum_of(shards / name) for name in names}
    (shards / MANIFEST).write_text(json.dumps({"files": sums}))


@pytest.mark.parametrize("file", [".metadata", META, "a shard"])
def test_no_program_is_run_from_a_folder(seen: Seen, file: str, tmp_path: Path) -> None:
    shards = tmp_path / "last.ckpt"
    shutil.copytree(seen["shards"], shards)
    assert whole(shards).step == 4
    with_bomb(shards, file, Bomb(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"\(posix\.mkdir\)"):
        whole(shards)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", [".metadata", META, MANIFEST, "__1_0.distcp"])
def test_a_folder_that_lacks_a_part(seen: Seen, file: str, tmp_path: Path) -> None:
    shards = tmp_path / "last.ckpt"
    shutil.copytree(seen["shards"], shards)
    (shards / file).unlink()
    with pytest.raises(UserError, match=f"'{file}' is missing"):
        whole(shards)
