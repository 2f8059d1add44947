"""Asking vLLM servers over HTTP: many requests at once, answers in order, patience with the lost.

One thread with an event loop does all the talking; the methods of `Servers` may be called from any.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opd_lightning.errors import ServerAwayError, UserError
from opd_lightning.serving.addresses import checked_address, found_addresses
from opd_lightning.serving.wire import FIRST_PAUSE, Line, LostError, Server, read_key

log = logging.getLogger(__name__)

LONGEST_PAUSE = 8.0  # seconds between attempts to reach a lost server
FAULTS = 5  # of one request that reached a server, before it is believed to be the request's


@dataclass(eq=False)
class _Job:
    method: str
    path: str
    body: dict[str, Any] | None
    servers: Sequence[Server]  # any of them may do it
    read: Callable[[Any], Any] = lambda answer: answer
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    faults: int = 0


class Servers:
    """Some vLLM servers of one model.

    Unreachable servers, time-outs and answers 5xx are tried again; a lost server's work moves to
    the others. Answers 4xx are the asker's mistake: a `UserError` with the server's own words.

    Args:
        servers: Their addresses, such as "http://127.0.0.1:8000", or paths of their address files,
            which are read when the servers are first asked.
        key_file: File with the key alone, readable by its owner alone. None takes the environment
            variable OPD_SERVER_KEY, if it is set.
        patience: Seconds that servers, or their address files, are waited for.
        timeout: Seconds that one request may take.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        key_file: str | None = None,
        patience: float = 600.0,
        timeout: float = 600.0,
    ) -> None:
        if not servers:
            raise UserError("servers: got none, expected addresses such as http://127.0.0.1:8000")
        if patience < 0:
            raise UserError(f"servers: patience is {patience} seconds, expected at least 0")
        self._addresses = [checked_address(server) for server in servers]
        self.key_file = key_file
        self.patience = patience
        self.timeout = timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[Server] = []
        # Touched by the loop's thread alone.
        self._waiting: deque[_Job] = deque()
        self._running: set[asyncio.Task[None]] = set()

    def spread(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        readers: Sequence[Callable[[Any], Any]] | None = None,
    ) -> list[Future[Any]]:
        """POST each body to one of the servers; the futures are in the order of the bodies.

        `readers` turn the answers into something smaller as they arrive. Errors (`UserError`,
        `ServerAwayError`) come out of the futures. Who cancels one takes it back from its server.
        """
        servers = self._open()
        reads = readers or [_Job.read] * len(bodies)
        jobs = [
            _Job("POST", path, body, servers, read)
            for body, read in zip(bodies, reads, strict=True)
        ]
        return self._submit(jobs)

    def everywhere(self, path: str, body: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """POST to each server; all must answer."""
        return self._each("POST", path, body)

    def read(self, path: str) -> list[dict[str, Any]]:
        """GET from each server; all must answer."""
        return self._each("GET", path, None)

    @property
    def urls(self) -> list[str]:
        """Their addresses; waits for address files that are not there yet."""
        return [server.line.url for server in self._open()]

    def close(self) -> None:
        """Take back what is under way and hang up; a later request dials anew."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._hang_up(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    # In the caller's thread -----------------------------------------------------------------

    def _open(self) -> list[Server]:
        with self._lock:
            if self._loop is None:
                key = read_key(self.key_file)
                urls = found_addresses(self._addresses, patience=self.patience)
                self._servers = [Server(Line(url, key, self.timeout)) for url in urls]
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
            return self._servers

    def _each(self, method: str, path: str, body: dict[str, Any] | None) -> list[dict[str, Any]]:
        jobs = [_Job(method, path, body, [server]) for server in self._open()]
        return [future.result() for future in self._submit(jobs)]

    def _submit(self, jobs: Sequence[_Job]) -> list[Future[Any]]:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._enqueue, jobs)
        return [job.future for job in jobs]

    # In the loop's thread -------------------------------------------------------------------

    def _enqueue(self, jobs: Sequence[_Job]) -> None:
        self._waiting.extend(jobs)
        self._pump()

    def _pump(self) -> None:
        """Send what can be sent: the oldest work first, to whoever has the least."""
        now = time.monotonic()
        passed_over: list[_Job] = []
        while self._waiting and any(server.has_room(now) for server in self._servers):
            job = self._waiting.popleft()
            free = [server for server in job.servers if server.has_room(now)]
            if job.future.cancelled():
                continue
            if not free:
                passed_over.append(job)
                continue
            server = min(free, key=lambda s: (s.lost_since is not None, s.in_flight))
            server.in_flight += 1
            server.is_probed = server.lost_since is not None
            task = asyncio.ensure_future(self._do(job, server))
            self._running.add(task)
            task.add_done_callback(partial(self._release, job, server))
            job.future.add_done_callback(partial(_take_back, task))
        self._waiting.extendleft(reversed(passed_over))

    async def _do(self, job: _Job, server: Server) -> None:
        try:
            answer = job.read(await server.line.ask(job.method, job.path, job.body))
        except LostError as fault:
            self._note(fault, job, server)
        except UserError as error:
            self._heal(server)
            _settle(job, error)
        except Exception as error:
            _settle(job, error)
        else:
            self._heal(server)
            _settle(job, answer)

    def _release(self, job: _Job, server: Server, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():
            job.future.cancel()
        server.in_flight -= 1
        server.is_probed = False
        self._pump()

    def _heal(self, server: Server) -> None:
        if server.lost_since is not None:
            log.warning("%s answers again", server.line.url)
        server.lost_since, server.pause = None, FIRST_PAUSE

    def _note(self, fault: LostError, job: _Job, server: Server) -> None:
        """A server did not do its work: let it rest, and give the work to whoever is there."""
        now = time.monotonic()
        if server.lost_since is None:
            log.warning("%s: %s; trying again for %g s", server.line.url, fault, self.patience)
            server.lost_since = now
        if now >= server.retry_at:  # the others that were under way tell nothing new
            pause = min(server.pause, self.patience / 4)
            server.retry_at, server.pause = now + pause, min(2 * server.pause, LONGEST_PAUSE)
            asyncio.get_running_loop().call_later(pause + 1e-3, self._pump)
        job.faults += fault.reached
        if job.faults >= FAULTS:
            message = f"failed {FAULTS} times at one request, the last time it {fault}"
            _settle(job, ServerAwayError(f"{server.line.url}: {message}"))
            return
        self._waiting.appendleft(job)
        given_up = [job for job in self._waiting if self._is_hopeless(job, now)]
        self._waiting = deque(job for job in self._waiting if job not in given_up)
        for job in given_up:
            who = " and ".join(server.line.url for server in job.servers)
            message = f"{who}: no answer for {self.patience:g} s ({fault}); start it, then "
            _settle(job, ServerAwayError(message + "run, or resume the run that this ended"))

    def _is_hopeless(self, job: _Job, now: float) -> bool:
        lost = [s.lost_since for s in job.servers if s.lost_since is not None]
        return len(lost) == len(job.servers) and now - max(job.since, *lost) >= self.patience

    async def _hang_up(self) -> None:
        self._waiting, left = deque(), [job.future for job in self._waiting]
        for future in left:
            future.cancel()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for server in self._servers:
            await server.line.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _take_back(task: asyncio.Task[None], future: Future[Any]) -> None:
    """Whoever cancels the future wants the server to stop."""
    if future.cancelled() and not task.done():
        task.get_loop().call_soon_threadsafe(task.cancel)


def _settle(job: _Job, outcome: Any) -> None:
    with suppress(InvalidStateError):  # cancelled a moment ago
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
