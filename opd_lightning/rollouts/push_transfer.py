"""Weights on their way to servers through vLLM's weight transfer: over NCCL, or gloo."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from opd_lightning.errors import PushLostError, RunStoppedError, UserError
from opd_lightning.rollouts.push import Push
from opd_lightning.serving.client import Servers
from opd_lightning.serving.gloo_group import own_address
from opd_lightning.serving.transfer_client import LEAVE, STATE, TransferClient, gpu_in_use
from opd_lightning.serving.vllm_process import vllm_unavailable

if TYPE_CHECKING:
    from opd_lightning.rollouts.transfer_sender import Source, Transport

log = logging.getLogger(__name__)

WORDS = 600  # letters of a failure that are told on
WORDS_SECONDS = 5.0  # that a server's own account of a failure is waited for
THREAD_SECONDS = 60.0  # that a sender may take to stop once its group is gone


class PushTransfer(Push):
    """The trainer and all workers of all servers are one group, in which rank 0 broadcasts.

    The group is formed at the first push, and again when a server is a new process or has joined
    somebody else's. Nothing about it is encrypted or asks for a key: for trusted networks.

    Args:
        transport: What carries the tensors.
        dtype: Of the tensors sent.
        host: Address of this machine that servers find the group at; None takes the one from
            which this machine reaches them.
        timeout: Seconds that a push may take; after that its members stop waiting.
    """

    def __init__(
        self, transport: Transport, dtype: torch.dtype, *, host: str | None, timeout: float
    ) -> None:
        self._transport: Transport = transport
        self._dtype = dtype
        self._host = host
        self._timeout = timeout
        self._group = ""
        self._sender: Any = None

    def check_here(self) -> None:
        """vLLM is here; over NCCL, a GPU."""
        if self._transport == "nccl" and gpu_in_use() is None:
            raise UserError(
                "engine.push: got nccl, but this machine has no GPU; use push: gloo, or folder"
            )
        if reason := vllm_unavailable():
            raise UserError(
                f"engine.push: {self._transport} needs vLLM: {reason}; use push: folder"
            )

    def check(self, servers: Servers) -> None:
        """They have this machine's vLLM; over NCCL, each has GPUs, and none that is the trainer's.

        NCCL refuses a group in which two members have one GPU.
        """
        from vllm import __version__ as own

        theirs = {answer["version"] for answer in servers.read("/version")}
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

    def start(self, servers: Servers, shapes: Mapping[str, torch.Size]) -> None:
        """The group is formed when there is something to send."""
        from opd_lightning.rollouts.transfer_sender import Source

        on_gpu = self._transport == "nccl"
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        self._servers = servers
        self._source: Source = Source(shapes, self._dtype, device)

    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Over the group, in chunks; see `transfer_sender`."""
        self._gather()
        self._servers.everywhere("/update_weight_version", {"new_version": label})
        self._source.weights = weights
        self._while_servers_do_their_part(self._sender.send_weights)

    def close(self) -> None:
        """Hang up; servers notice when somebody pushes again."""
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None

    def _gather(self) -> None:
        """Have every worker of every server in the group. Waits for servers that are away."""
        states = self._states(self._servers)
        if self._sender is not None and all(
            group == self._group for workers in states for group, _ in workers
        ):
            return
        if self._sender is not None:
            log.warning("a server is a new one; forming the transfer group again")
        self.close()
        self._servers.everywhere("/collective_rpc", LEAVE)
        answers = self._servers.read("/get_world_size")
        sizes = [answer["world_size"] for answer in answers]
        self._group = secrets.token_hex(8)
        told = {
            "transport": self._transport,
            "group": self._group,
            "timeout": 0.9 * self._timeout,  # before requests do: the servers' words come first
        }
        self._client = TransferClient(self._servers, sizes, told)
        self._sender = self._while_servers_do_their_part(lambda: self._open(sum(sizes)))

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

    def _while_servers_do_their_part(self, work: Callable[[], Any]) -> Any:
        """`work` blocks until the servers have done theirs: for ever, with NCCL, if one fails.

        So it is done in a thread that is given up once a request has failed.
        """
        done: Future[Any] = Future()
        arguments = (work, done, self._source.device)
        thread = threading.Thread(target=_do, args=arguments, daemon=True)
        thread.start()
        wait([done, self._client.failed], return_when=FIRST_COMPLETED)
        if done.done() and done.exception() is None:
            return done.result()
        if done.done() and isinstance(done.exception(), UserError):
            self.close()
            return done.result()  # raises it
        wait([self._client.failed], timeout=WORDS_SECONDS)
        cause = (self._client.failed if self._client.failed.done() else done).exception()
        line = " ".join(str(cause).split())[:WORDS]
        forming = self._sender is None  # then nothing else needs what the thread works on
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
            f"a push was broken off: {line}; see the servers' logs, then resume the run"
        ) from cause

    def _address(self) -> str:
        """Of this machine, for the servers."""
        return self._host or _way_to(self._servers.urls)

    def _states(self, servers: Servers) -> list[list[tuple[str | None, str | None]]]:
        """Of every worker of every server: the group it is in, and its GPU."""
        return [answer["results"] for answer in servers.everywhere("/collective_rpc", STATE)]


def _do(work: Callable[[], Any], done: Future[Any], device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # every thread has its own
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def _way_to(urls: Iterable[str]) -> str:
    """The address from which this machine reaches the servers; loopback only if it is all of it."""
    own = [own_address(urlsplit(url).hostname or "") for url in urls]
    return min(own, key=lambda address: address.startswith("127.") or address == "::1")
