"""Client for vLLM's weight senders, to which several servers look like one engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from itertools import accumulate
from typing import Any

import torch

from opd_lightning.errors import ServerAwayError
from opd_lightning.serving.client import Servers

STATE = {"method": "transfer_state"}
LEAVE = {"method": "leave_transfer"}
CAUSE_SECONDS = 1.0


def gpu_in_use() -> str | None:
    """Return the UUID of this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class TransferClient:
    """A `VLLMWeightSyncClient` for several servers. Each request carries the servers' key.

    No request is retried, since a partial push cannot be repeated. The first failure is also set
    on the future `failed`, for threads that wait for the push.

    Args:
        servers: All receivers.
        sizes: Number of workers of each server.
        more: Init arguments for our receivers in addition to vLLM's.
    """

    def __init__(self, servers: Servers, sizes: Sequence[int], more: dict[str, Any]) -> None:
        self._servers = servers
        self._sizes = sizes
        self._more = more
        self.failed: Future[None] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Make all servers join the group; each server's workers get distinct ranks."""
        offsets = rank_offsets(self._sizes, first=init_info["rank_offset"])
        self._ask(
            "/init_weight_transfer_engine",
            [{"init_info": {**init_info, **self._more, "rank_offset": rank}} for rank in offsets],
        )

    def start_weight_update(self) -> None:
        self._ask_all("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Return when all servers have received all weights."""
        self._ask_all("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask_all("/finish_weight_update", {})

    def _ask_all(self, path: str, body: dict[str, Any]) -> None:
        self._ask(path, [body] * len(self._sizes))

    def _ask(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        futures = self._servers.submit_each(path, bodies)
        wait(futures, return_when=FIRST_EXCEPTION)
        # The cause and its consequences at other servers arrive in any order.
        done, _ = wait(futures, timeout=CAUSE_SECONDS)
        if errors := [error for future in done if (error := future.exception())]:
            error = ServerAwayError("; ".join(sorted(str(error) for error in errors)))
            if not self.failed.done():
                self.failed.set_exception(error)
            raise error


def rank_offsets(sizes: Sequence[int], *, first: int) -> list[int]:
    """Return the lowest rank of each server; the sender's is 0."""
    return [*accumulate(sizes[:-1], initial=first)]
