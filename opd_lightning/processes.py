"""Collectives with which the processes of a run exchange values and agree on outcomes.

Every function is collective unless its docstring states otherwise: all processes must call it.
`Ending` is not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opd_lightning.errors import note, raised_by_all

T = TypeVar("T")

PATIENCE = 10.0  # seconds to wait for other processes to end with the same line
POLL_INTERVAL = 0.05  # seconds

# Parts of gloo and NCCL errors when the peer of a connection has ended or does not answer.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "remote process exited",
)


def rank() -> int:
    """Return the rank of this process; 0 without a process group. Not collective."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes. Not collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is rank 0. Not collective."""
    return rank() == 0


def rank_zero_note(message: str) -> None:
    """Print one line of information on rank 0. Not collective."""
    if is_first():
        note(message)


def gather(mine: T) -> list[T]:
    """Return the value of every process, by rank."""
    if not dist.is_initialized():
        return [mine]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values  # type: ignore[return-value]


def concatenate_ranks(rows: Tensor) -> Tensor:
    """Concatenate the `[M, C]` tensors of all ranks; M may differ between ranks."""
    if world_size() == 1:
        return rows
    return torch.cat(gather(rows.cpu())).to(rows.device)


def broadcast(decide: Callable[[], T]) -> T:
    """Run `decide` on rank 0 and return its result, or raise its exception, on every rank."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            outcome = [(decide(), None)]
        except Exception as error:
            outcome = [(None, error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise raised_by_all(failure)
    return result  # type: ignore[return-value]


def run_on_first(first: Callable[[], Any], others: Callable[[], Any] = lambda: None) -> Any:
    """Run `first` on rank 0 and `others` elsewhere, after a barrier.

    Every rank returns the result of `first`. An exception of `first` is raised on all ranks, one
    of `others` on its rank only.
    """
    if not dist.is_initialized():
        return first()
    dist.barrier()  # after it no rank has an open request to the shared servers
    try:
        outcome = [first() if is_first() else others()]
    except Exception as error:
        outcome = [error]
    own = outcome[0]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise raised_by_all(outcome[0])
    if isinstance(own, Exception):
        raise own
    return outcome[0]


def drain(weights: Iterable[Any]) -> None:
    """Consume an iterator over weights, each of which all ranks must gather together."""
    for _ in weights:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Rank, world size and collectives of a Lightning trainer."""

    rank: int
    world_size: int
    sum: Callable[[int], int]  # over all ranks
    gather: Callable[[Any], list[Any]]  # plain data of every rank, by rank

    def batches(self, count: int, size: int) -> list[range]:
        """Distribute `count` indices over ranks in batches of at most `size`.

        Every rank gets the same number of batches; the last ones may be empty.
        """
        mine = range(self.rank, count, self.world_size)
        batches = -(-count // (self.world_size * size))
        return [mine[first : first + size] for first in range(0, batches * size, size)]

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """Build from a Lightning trainer."""
        strategy = trainer.strategy

        def add_up(value: int) -> int:
            here = torch.tensor(value, dtype=torch.int64, device=strategy.root_device)
            return int(strategy.reduce(here, reduce_op="sum"))

        return cls(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            sum=add_up,
            gather=lambda value: [value] if trainer.world_size == 1 else gather(value),
        )


class Ending:
    """Counter of the processes that end with the same line, which one of them prints.

    An error during set-up ends every process with the same line. No method is collective: a
    process may also end alone, while the others wait for it in a collective.

    Args:
        line: The line to print.
    """

    def __init__(self, line: str) -> None:
        self._key = f"ending-{hashlib.sha256(line.encode()).hexdigest()}"
        self.is_first = self._add(1) <= 1  # if the count is lost, twice rather than never

    def wait_for_all(self) -> bool:
        """Return whether all processes end with this line within `PATIENCE` seconds."""
        if not dist.is_initialized():
            return False
        deadline = time.monotonic() + PATIENCE
        while (arrived := self._add(0)) < dist.get_world_size():
            if arrived == 0 or time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return True

    def _add(self, count: int) -> int:
        """Add `count` to the number of arrivals and return it; 0 if the store's process is gone."""
        if not dist.is_initialized():
            return count
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.add(self._key, count))
        except RuntimeError:
            return 0


def describe_lost_rank(error: BaseException) -> str | None:
    """Return one line for an exception caused by a lost process; None for any other exception."""
    text = " ".join(str(error).split())
    backend = isinstance(error, dist.DistError) or "gloo/" in text
    signs = [sign for sign in _LOST_PEER if sign in text]
    if not backend or not signs:
        return None
    where = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    return (
        f"{where}another process of the run is gone, or does not answer ({signs[0]}); its own "
        "messages, above or in its log, have the reason; resume from the last checkpoint"
    )
