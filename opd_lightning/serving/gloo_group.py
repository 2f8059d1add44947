"""A transfer group over gloo: one sender, rank 0, and its receivers, which need no GPU."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

FORMING_SECONDS = 60.0  # that a member waits for the others to join, at most


def own_address(host: str) -> str:
    """This machine's address on the way to `host`; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)
        return str(way.getsockname()[0])


def free_port(host: str) -> int:
    """A port of `host`, an address of this machine, that nobody listens on now."""
    with _listener(host, 0) as listener:
        return int(listener.getsockname()[1])


class GlooGroup:
    """Broadcasts CPU tensors from rank 0.

    It listens on one address of each machine. There is no authentication: whoever reaches the
    sender's port while the group forms can take a receiver's place.

    Every member raises RuntimeError when another one is gone, or does nothing for `timeout`
    seconds.
    """

    def __init__(
        self, store: dist.Store, address: str, *, rank: int, world_size: int, timeout: float
    ) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = _forming(timeout)
        self._store: dist.Store | None = store  # lives as long as the group
        self._group = gloo(store, rank, world_size, options)
        self._group.set_timeout(timedelta(seconds=timeout))

    @classmethod
    def lead(cls, host: str, port: int, *, world_size: int, timeout: float) -> Self:
        """As rank 0; returns when all have joined.

        Args:
            host: Address of this machine that the others reach.
            port: Of `host`; nobody listens on it.
            world_size: Members, this one included.
            timeout: Seconds that members wait for one another at every broadcast.
        """
        # PyTorch's own listener would be on every interface.
        listener = _listener(host, port).detach()
        try:
            store = dist.TCPStore(
                host,
                port,
                world_size,
                is_master=True,
                timeout=_forming(timeout),
                wait_for_workers=False,
                master_listen_fd=listener,
            )
        except Exception:
            socket.close(listener)
            raise
        return cls(store, host, rank=0, world_size=world_size, timeout=timeout)

    @classmethod
    def join(cls, host: str, port: int, *, rank: int, world_size: int, timeout: float) -> Self:
        """As a receiver of the sender that listens there."""
        if not 0 < rank < world_size:
            raise ValueError(f"rank {rank} of a transfer group of {world_size}")
        patience = _forming(timeout)
        store = dist.TCPStore(host, port, world_size, timeout=patience, wait_for_workers=False)
        address = own_address(host)
        return cls(store, address, rank=rank, world_size=world_size, timeout=timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """From rank 0's `tensor` into the others', which have its size and dtype."""
        self._group.broadcast(tensor, 0).wait()

    def destroy(self) -> None:
        """Hang up; whoever waits for this member stops."""
        self._group = self._store = None  # nothing but letting go closes the connections


def _forming(timeout: float) -> timedelta:
    return timedelta(seconds=min(timeout, FORMING_SECONDS))


def _listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
