"""Weight transfer group over gloo: one sender, rank 0, and its receivers; needs no GPU."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

FORMING_SECONDS = 60.0  # longest wait of a member for the others to join


def own_address(host: str) -> str:
    """Return the local address of the route to `host`; sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)
        return str(way.getsockname()[0])


def free_port(host: str) -> int:
    """Return a free port of `host`, an address of this machine."""
    with _listener(host, 0) as listener:
        return int(listener.getsockname()[1])


class GlooGroup:
    """Gloo process group that broadcasts CPU tensors from rank 0.

    It listens on one address of each machine. There is no authentication: any process that reaches
    the sender's port while the group forms can join in place of a receiver.

    Every member raises RuntimeError if another one has left, or is idle for `timeout` seconds.
    """

    def __init__(
        self, store: dist.Store, address: str, *, rank: int, world_size: int, timeout: float
    ) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = _forming(timeout)
        self._store: dist.Store | None = store  # must outlive the group
        self._group = gloo(store, rank, world_size, options)
        self._group.set_timeout(timedelta(seconds=timeout))

    @classmethod
    def lead(cls, host: str, port: int, *, world_size: int, timeout: float) -> Self:
        """Form the group as rank 0; return when all members have joined.

        Args:
            host: Address of this machine that the others reach.
            port: Free port of `host`.
            world_size: Number of members, this one included.
            timeout: Seconds that members wait for one another at every broadcast.
        """
        # PyTorch's own listener would listen on every interface.
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
        """Join the group of the sender that listens at `host` and `port`."""
        if not 0 < rank < world_size:
            raise ValueError(f"rank {rank} of a transfer group of {world_size}")
        patience = _forming(timeout)
        store = dist.TCPStore(host, port, world_size, timeout=patience, wait_for_workers=False)
        address = own_address(host)
        return cls(store, address, rank=rank, world_size=world_size, timeout=timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast rank 0's `tensor` into the others', which have its size and dtype."""
        self._group.broadcast(tensor, 0).wait()

    def destroy(self) -> None:
        """Close the connections; members that wait for this one raise."""
        self._group = self._store = None  # only dropping the references closes the connections


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
