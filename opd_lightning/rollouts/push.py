"""Contract of weight pushes to servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor

from opd_lightning.serving.client import Servers


class Push(ABC):
    """Method of sending weights to servers. Used by rank 0 only."""

    def check_here(self) -> None:  # noqa: B027
        """Raise UserError if this machine lacks a requirement; sends no requests to servers."""

    def check(self, servers: Servers) -> None:  # noqa: B027
        """Raise UserError if pushes cannot work with these servers, before any weights load."""

    @abstractmethod
    def start(self, servers: Servers, tensors: Mapping[str, Tensor]) -> None:
        """Prepare to push tensors of these names, shapes and dtypes (meta device), in this order.

        `send` converts tensors of another dtype.
        """

    @abstractmethod
    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights of all servers and their label by `label`.

        The label changes before the weights do, so a server that fails passes for neither version.
        Raises `PushLostError` if a server was lost; the push may be retried.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources; `start` may be called again."""
