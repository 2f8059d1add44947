"""One request on its way: who may answer it, what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from opd_lightning.serving.wire import Server

FAULTS = 5  # of one request that reached a server, before it is believed to be the request's


@dataclass(eq=False)
class Job:
    """A request, and the future that its asker waits for."""

    method: str
    path: str
    body: dict[str, Any] | None
    servers: Sequence[Server]  # any of them may do it
    read: Callable[[Any], Any] = lambda answer: answer
    attempts: int = FAULTS  # how often it may fail; a job of one is not sent again to a lost server
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    faults: int = 0

    def settle(self, outcome: Any) -> None:
        """Tell the asker: an answer, or the error that there was instead."""
        with suppress(InvalidStateError):  # cancelled a moment ago
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)

    def drop(self) -> None:
        """Nobody will answer. `cancel` alone does not wake who is in `concurrent.futures.wait`."""
        if self.future.cancel():
            self.future.set_running_or_notify_cancel()

    def is_hopeless(self, now: float, patience: float) -> bool:
        """Its servers have been away for too long."""
        lost = [s.lost_since for s in self.servers if s.lost_since is not None]
        return len(lost) == len(self.servers) and now - max(self.since, *lost) >= patience

    def ends_with(self, task: asyncio.Task[None]) -> None:
        """Whoever cancels the future wants the server to stop."""

        def take_back(future: Future[Any]) -> None:
            if future.cancelled() and not task.done():
                task.get_loop().call_soon_threadsafe(task.cancel)

        self.future.add_done_callback(take_back)
