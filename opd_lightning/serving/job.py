"""A pending request: the servers that may answer it, and its future."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from opd_lightning.errors import RunStoppedError, UserError, reason_of
from opd_lightning.serving.connection import LostError, Server

FAULTS = 5  # failures of one request that reached a server, before the request itself fails


@dataclass(eq=False)
class Job:
    """A request and the future that its caller waits for."""

    method: str
    path: str
    body: dict[str, Any] | None
    servers: Sequence[Server]  # any of them may answer
    read: Callable[[Any], Any] = lambda answer: answer
    attempts: int = FAULTS  # 1: not retried at all, also if the server is lost
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    faults: int = 0

    def read_from(self, url: str, answer: Any) -> Any:
        """Return the parsed answer of the server at `url`.

        Raises:
            UserError: If the answer is not one to this request.
            LostError: If the request must be repeated.
        """
        try:
            return self.read(answer)
        except (LostError, UserError, RunStoppedError):
            raise
        except Exception as error:  # any type: an answer may hold anything
            raise UserError(
                f"{url}{self.path}: its answer does not fit the request: {reason_of(error)}; is it "
                "a server of `opd serve`, and of this version?"
            ) from error

    def resolve(self, outcome: Any) -> None:
        """Set the future's result, or its exception if `outcome` is one."""
        with suppress(InvalidStateError):  # cancelled at the same time
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)

    def drop(self) -> None:
        """Cancel the future. `cancel` alone does not wake callers of `concurrent.futures.wait`."""
        if self.future.cancel():
            self.future.set_running_or_notify_cancel()

    def has_expired(self, now: float, patience: float) -> bool:
        """Return whether all of its servers have been lost for `patience` seconds."""
        lost = [s.lost_since for s in self.servers if s.lost_since is not None]
        return len(lost) == len(self.servers) and now - max(self.since, *lost) >= patience

    def cancel_with(self, task: asyncio.Task[None]) -> None:
        """Cancel `task` when the future is cancelled, which aborts the request at the server."""

        def cancel_task(future: Future[Any]) -> None:
            if future.cancelled() and not task.done():
                task.get_loop().call_soon_threadsafe(task.cancel)

        self.future.add_done_callback(cancel_task)
