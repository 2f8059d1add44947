"""Weight pushes through vLLM's weight transfer over NCCL or gloo."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from opd_lightning.errors import PushLostError, RunStoppedError, UserError
from opd_lightning.rollouts.push import Push
from opd_lightning.serving.answers import field
from opd_lightning.serving.client import Servers
from opd_lightning.serving.gloo_group import own_address
from opd_lightning.serving.transfer_client import LEAVE, STATE, TransferClient, gpu_in_use
from opd_lightning.serving.vllm_process import vllm_unavailable

if TYPE_CHECKING:
    from opd_lightning.rollouts.transfer_sender import Source, Transport

log = logging.getLogger(__name__)

CAUSE_LENGTH = 600  # maximum characters of a failure's cause in a message
CAUSE_SECONDS = 5.0  # wait for the server's report of a failure
THREAD_SECONDS = 60.0  # wait for a sender to stop once its group is closed


class PushTransfer(Push):
    """Push by broadcast in a group of the trainer (rank 0) and all workers of all servers.

    The group is formed at the first push, and again if a server was restarted or has joined
    another group. It has no encryption and no authentication: for trusted networks only.

    Args:
        transport: Library that carries the tensors.
        host: Address of this machine at which servers join the group; None takes the local address
            of the route to them.
        timeout: Seconds that a push may take; after that its members stop waiting.
    """

    def __init__(self, transport: Transport, *, host: str | None, timeout: float) -> None:
        self._transport: Transport = transport
        self._host = host
        self._timeout = timeout
        self._group = ""
        self._sender: Any = None

    def check_here(self) -> None:
        """Raise UserError if vLLM is missing or, over NCCL, a GPU."""
        if self._transport == "nccl" and gpu_in_use() is None:
            raise UserError(
                "engine.push: got nccl, but this machine has no GPU; use push: gloo, or folder"
            )
        if reason := vllm_unavailable():
            raise UserError(
                f"engine.push: {self._transport} needs vLLM: {reason}; use push: folder"
            )

    def check(self, servers: Servers) -> None:
        """Raise UserError if versions of vLLM differ or, over NCCL, a server lacks its own GPU.

        NCCL refuses a group in which two members share a GPU.
        """
        from vllm import __version__ as own

        theirs = set(servers.get_all("/version", partial(field, name="version", kind=str)))
        if theirs != {own}:
            raise UserError(
                f"engine.push: got vLLM {own} here and {' and '.join(sorted(theirs))} at the "
                "servers, expected one version; use it everywhere, or push: folder"
            )
        if self._transport == "nccl":
            for url, workers in zip(servers.urls, self._states(servers), strict=True):
                gpus = [gpu for _, gpu in workers]
                if None in gpus:
                    raise UserError(
                        f"engine.push: got nccl, but {url} has no GPU; use push: gloo, or folder"
                    )
                if gpu_in_use() in gpus:
                    raise UserError(
                        f"engine.push: got nccl, but {url} and the trainer share a GPU, which NCCL "
                        "refuses; give the server another one, or use push: gloo, or folder"
                    )

    def start(self, servers: Servers, tensors: Mapping[str, Tensor]) -> None:
        """Prepare the source of the tensors; the group is formed at the first push."""
        from opd_lightning.rollouts.transfer_sender import Source

        on_gpu = self._transport == "nccl"
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        self._servers = servers
        self._source: Source = Source(tensors, device)

    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast the weights in chunks; see `transfer_sender`."""
        self._ensure_group()
        self._servers.post_all("/update_weight_version", {"new_version": label})
        self._source.weights = weights
        self._run_with_servers(self._sender.send_weights)

    def close(self) -> None:
        """Leave the group; servers notice at the next push."""
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None

    def _ensure_group(self) -> None:
        """Form the group unless every worker of every server is in it. Waits for lost servers."""
        states = self._states(self._servers)
        if self._sender is not None and all(
            group == self._group for workers in states for group, _ in workers
        ):
            return
        if self._sender is not None:
            log.warning("a server is a new one; forming the transfer group again")
        self.close()
        self._servers.post_all("/collective_rpc", LEAVE)
        size = partial(field, name="world_size", kind=int)
        sizes = self._servers.get_all("/get_world_size", size)
        self._group = secrets.token_hex(8)
        more = {
            "transport": self._transport,
            "group": self._group,
            "timeout": 0.9 * self._timeout,  # less than a request's, so that servers report errors
        }
        self._client = TransferClient(self._servers, sizes, more)
        self._sender = self._run_with_servers(lambda: self._open(sum(sizes)))

    def _open(self, receivers: int) -> Any:
        from opd_lightning.rollouts.transfer_sender import open_sender

        return open_sender(
            self._transport,
            host=self._address(),
            receivers=receivers,
            timeout=self._timeout,
            client=self._client,
            source=self._source,
        )

    def _run_with_servers(self, work: Callable[[], Any]) -> Any:
        """Run `work`, which waits for the servers, in a thread and return its result.

        With NCCL it blocks indefinitely if a server fails, so the thread is abandoned once a
        request has failed.
        """
        done: Future[Any] = Future()
        arguments = (work, done, self._source.device)
        thread = threading.Thread(target=_run_into, args=arguments, daemon=True)
        thread.start()
        wait([done, self._client.failed], return_when=FIRST_COMPLETED)
        if done.done() and done.exception() is None:
            return done.result()
        if done.done() and isinstance(done.exception(), UserError):
            self.close()
            return done.result()  # raises it
        wait([self._client.failed], timeout=CAUSE_SECONDS)
        cause = (self._client.failed if self._client.failed.done() else done).exception()
        line = " ".join(str(cause).split())[:CAUSE_LENGTH]
        forming = self._sender is None  # then no other thread needs this thread's objects
        self.close()
        thread.join(0.0 if forming else THREAD_SECONDS)
        if thread.is_alive() and not forming:
            raise RunStoppedError(
                f"a push failed ({line}) and its sender does not stop; resume the run"
            ) from cause
        if forming:
            raise PushLostError(
                f"no transfer group was formed: {line}; see that the servers reach this machine at "
                f"{self._address()}, or give another engine.push_host, then resume the run"
            ) from cause
        raise PushLostError(
            f"a push was interrupted: {line}; see the servers' logs, then resume the run"
        ) from cause

    def _address(self) -> str:
        """Return this machine's address for the servers."""
        return self._host or _address_towards(self._servers.urls)

    def _states(self, servers: Servers) -> list[list[tuple[str | None, str | None]]]:
        """Return the group and the GPU of every worker of every server."""
        return servers.post_all("/collective_rpc", STATE, _states)


def _states(answer: Any) -> list[tuple[str | None, str | None]]:
    return [(group, gpu) for group, gpu in field(answer, "results", list)]


def _run_into(work: Callable[[], Any], done: Future[Any], device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is per thread
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def _address_towards(urls: Iterable[str]) -> str:
    """Return the local address of the routes to the servers; loopback only if all are local."""
    own = [own_address(urlsplit(url).hostname or "") for url in urls]
    return min(own, key=lambda address: address.startswith("127.") or address == "::1")
