"""A line with which several processes end is printed by one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from opd_lightning import processes as processes_module
from opd_lightning.processes import Ending
from tests.processes import call_ranks


def end(rank: int, rendezvous: str, lines: tuple[str, str], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    processes_module.PATIENCE = 0.5 if "alone" in lines[rank] else 60.0
    ending = Ending(lines[rank])
    answer = (ending.is_first, ending.wait_for_all())
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("same", "same"), [[False, True], [True, True]]),
        (("one alone", "other alone"), [[True, False], [True, False]]),
    ],
)
def test_one_of_those_that_end_alike_is_first(
    lines: tuple[str, str], expected: list[list[bool]], tmp_path: Path
) -> None:
    call_ranks(end, f"file://{tmp_path}/rendezvous", lines, tmp_path, count=2, timeout=120)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(answers) == expected


def test_a_single_process_says_it() -> None:
    ending = Ending("line")
    assert ending.is_first
    assert not ending.wait_for_all()
