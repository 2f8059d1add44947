"""HTTP client for vLLM servers: concurrent requests, answers in order, retries.

One thread with an event loop sends all requests. The methods of `Servers` are thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from opd_lightning.errors import ServerAwayError, UserError
from opd_lightning.serving.addresses import (
    address_file,
    checked_address,
    read_address,
    resolve_addresses,
)
from opd_lightning.serving.connection import FIRST_PAUSE, Connection, LostError, Server
from opd_lightning.serving.job import Job
from opd_lightning.serving.keys import read_key

log = logging.getLogger(__name__)

LONGEST_PAUSE = 8.0  # seconds between attempts to reach a lost server, at most


class Servers:
    """vLLM servers of one model.

    Requests are retried if a server is unreachable, times out or answers 5xx; requests of a lost
    server move to the others. An answer 4xx is the caller's mistake and raises a `UserError` with
    the server's message.

    Args:
        servers: Addresses, such as "http://127.0.0.1:8000", or paths of address files. Files are
            read at the first request, and again while their server is lost.
        key_file: File with nothing but the key, readable by its owner only. None takes the
            environment variable OPD_SERVER_KEY, if it is set.
        patience: Seconds to wait for servers or their address files.
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
        if timeout <= 0:
            raise UserError(f"servers: timeout is {timeout} seconds, expected more than 0")
        self._addresses = [checked_address(server) for server in servers]
        self.key_file = key_file
        self.patience = patience
        self.timeout = timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[Server] = []
        # Used only in the event loop's thread.
        self._waiting: deque[Job] = deque()
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._addresses)

    def submit(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        readers: Sequence[Callable[[Any], Any]] | None = None,
    ) -> list[Future[Any]]:
        """POST each body to one of the servers; return futures in the order of the bodies.

        `readers` check and reduce the answers as they arrive; whatever they raise means that the
        answer is not one to the request. The futures raise `UserError` or `ServerAwayError`.
        Cancelling a future aborts its request at the server.
        """
        servers = self._open()
        reads = readers or [Job.read] * len(bodies)
        jobs = [
            Job("POST", path, body, servers, read) for body, read in zip(bodies, reads, strict=True)
        ]
        return self._submit(jobs)

    def post_all(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], Any] = Job.read,
    ) -> list[Any]:
        """POST to each server and return all answers, each as `read` returns it."""
        return self._each("POST", path, body, read)

    def submit_each(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Future[Any]]:
        """POST one body to each server without retries, for requests that are not idempotent."""
        servers = zip(self._open(), bodies, strict=True)
        return self._submit([Job("POST", path, body, [s], attempts=1) for s, body in servers])

    def get_all(self, path: str, read: Callable[[Any], Any] = Job.read) -> list[Any]:
        """GET from each server and return all answers, each as `read` returns it."""
        return self._each("GET", path, None, read)

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers; waits for address files that do not exist yet."""
        return [server.connection.url for server in self._open()]

    def close(self) -> None:
        """Cancel pending requests and close all connections; a later request reconnects."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    # In the caller's thread -----------------------------------------------------------------

    def _open(self) -> list[Server]:
        with self._lock:
            if self._loop is None:
                key = read_key(self.key_file)
                urls = resolve_addresses(self._addresses, patience=self.patience)
                self._servers = [
                    Server(Connection(url, key, self.timeout), address_file(address))
                    for url, address in zip(urls, self._addresses, strict=True)
                ]
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
            return self._servers

    def _each(
        self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any]
    ) -> list[Any]:
        jobs = [Job(method, path, body, [server], read) for server in self._open()]
        return [future.result() for future in self._submit(jobs)]

    def _submit(self, jobs: Sequence[Job]) -> list[Future[Any]]:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._enqueue, jobs)
        return [job.future for job in jobs]

    # In the loop's thread -------------------------------------------------------------------

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend(jobs)
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what can be sent: the oldest job first, to the least loaded server."""
        now = time.monotonic()
        passed_over: list[Job] = []
        while self._waiting and any(server.is_available(now) for server in self._servers):
            job = self._waiting.popleft()
            free = [server for server in job.servers if server.is_available(now)]
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
            job.cancel_with(task)
        self._waiting.extendleft(reversed(passed_over))

    async def _do(self, job: Job, server: Server) -> None:
        try:
            if server.lost_since is not None:
                await _refresh_address(server)
            told = await server.connection.request(job.method, job.path, job.body)
            answer = job.read_from(server.connection.url, told)
        except LostError as fault:
            self._handle_failure(fault, job, server)
        except UserError as error:
            self._mark_reachable(server)
            job.resolve(error)
        except Exception as error:
            job.resolve(error)
        else:
            self._mark_reachable(server)
            job.resolve(answer)

    def _release(self, job: Job, server: Server, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():
            job.drop()
        server.in_flight -= 1
        server.is_probed = False
        self._dispatch()

    def _mark_reachable(self, server: Server) -> None:
        if server.lost_since is not None:
            log.warning("%s answers again", server.connection.url)
        server.lost_since, server.pause = None, FIRST_PAUSE

    def _handle_failure(self, fault: LostError, job: Job, server: Server) -> None:
        """Handle a failed request: delay the server's next attempt and requeue the job."""
        now = time.monotonic()
        if server.lost_since is None:
            if job.attempts > 1:
                log.warning(
                    "%s: %s; trying again for %g s", server.connection.url, fault, self.patience
                )
            server.lost_since = now
        if now >= server.retry_at:  # failures of other requests in flight are not counted
            pause = min(server.pause, self.patience / 4)
            server.retry_at, server.pause = now + pause, min(2 * server.pause, LONGEST_PAUSE)
            asyncio.get_running_loop().call_later(pause + 1e-3, self._dispatch)
        if job.attempts == 1:
            job.resolve(ServerAwayError(f"{server.connection.url}: {fault}"))
            return
        job.faults += fault.reached
        if job.faults >= job.attempts:
            message = f"failed {job.faults} times at one request, the last time it {fault}"
            job.resolve(ServerAwayError(f"{server.connection.url}: {message}"))
            return
        self._waiting.appendleft(job)
        expired = [job for job in self._waiting if job.has_expired(now, self.patience)]
        self._waiting = deque(
            job for job in self._waiting if not job.has_expired(now, self.patience)
        )
        for job in expired:
            urls = " and ".join(server.connection.url for server in job.servers)
            message = f"{urls}: no answer for {self.patience:g} s ({fault}); start it, then "
            job.resolve(ServerAwayError(message + "run, or resume the run that this ended"))

    async def _close(self) -> None:
        self._waiting, left = deque(), list(self._waiting)
        for job in left:
            job.drop()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for server in self._servers:
            await server.connection.close()


async def _refresh_address(server: Server) -> None:
    """Read the address file of a lost server again: once restarted, its address may differ."""
    if server.file is not None:
        # In a thread: the disk may be slow, and the other requests must continue.
        url = await asyncio.to_thread(read_address, server.file)
        if url is not None and url != server.connection.url:
            log.warning("%s is at %s now", server.connection.url, url)
            server.connection.url = url


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
