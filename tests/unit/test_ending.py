"""A line that several processes end with is told by one of them."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch.distributed as dist

from opd_lightning import processes as processes_module
from opd_lightning.processes import Ending


def end(rank: int, port: int, line: str, answers: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes_module.PATIENCE = 2.0 if "alone" in line else 60.0
    ending = Ending(line)
    answers.put((ending.is_first, ending.wait_for_all()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("same", "same"), [(False, True), (True, True)]),
        (("one alone", "other alone"), [(True, False), (True, False)]),
    ],
)
def test_one_of_those_that_end_alike_is_first(
    lines: tuple[str, str], expected: list[tuple[bool, bool]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=end, args=(rank, port, line, answers))
        for rank, line in enumerate(lines)
    ]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=120) for _ in processes) == expected
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


def test_a_single_process_says_it() -> None:
    ending = Ending("line")
    assert ending.is_first
    assert not ending.wait_for_all()
