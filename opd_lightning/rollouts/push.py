"""The contract of a push to servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from opd_lightning.serving.client import Servers


class Push(ABC):
    """A way for weights to reach servers. The first rank alone uses it."""

    def check_here(self) -> None:  # noqa: B027
        """Refuse what this machine lacks; asks no server, for they may take minutes to come."""

    def check(self, servers: Servers) -> None:  # noqa: B027
        """Refuse what would not work with these servers, before any weights load."""

    @abstractmethod
    def start(self, servers: Servers, shapes: Mapping[str, torch.Size]) -> None:
        """Make ready to push tensors of these names and shapes, in this order."""

    @abstractmethod
    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights of all servers, which call them `label` from then on.

        They do as soon as their old ones are touched: one that fails passes for neither. Raises
        `PushLostError` if a server was lost on the way, after which a push may be tried again.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind; `start` begins anew."""
