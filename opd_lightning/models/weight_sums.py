"""Checks of weight pushes: sums over the weights of trainer and engine.

A log-prob gap reveals large differences of weights only. At a learning rate of 1e-6 and in bfloat16
it does not reveal one missed push; float64 sums over all elements do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from opd_lightning.errors import EngineMismatchError, RunStoppedError

RESOLUTION = 1e-10  # upper bound of the relative rounding of a float64 sum over a matrix
PART = 2**24  # elements summed at once, since PyTorch first converts all of them to float64


class WeightSum(NamedTuple):
    """Statistics of a tensor that do not depend on its layout, such as fusing and padding."""

    total: float  # sum of the elements
    norm: float  # Euclidean
    elements: int  # padding included

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        flat = tensor.detach().reshape(-1)
        parts = (flat if flat.is_floating_point() else flat.double()).split(PART)
        totals = [part.sum(dtype=torch.float64) for part in parts]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        total, norm = torch.stack(totals).sum(), torch.linalg.vector_norm(torch.stack(norms))
        return cls(float(total), float(norm), tensor.numel())

    @classmethod
    def combine(cls, parts: Sequence[Self]) -> Self:
        """Combine the sums of several tensors into that of their concatenation."""
        return cls(
            sum(part.total for part in parts),
            math.hypot(*(part.norm for part in parts)),
            sum(part.elements for part in parts),
        )

    def equals(self, other: Self) -> bool:
        """Return whether both are equal up to float64 rounding; NaN is never equal."""
        scale = RESOLUTION * max(self.norm, other.norm)
        same_total = abs(self.total - other.total) <= scale * math.sqrt(self.elements)
        return same_total and abs(self.norm - other.norm) <= scale


class EngineSum(NamedTuple):
    """Sum of one of the engine's parameters."""

    names: tuple[str, ...]  # Hugging Face parameters in it; several in a fused layer
    dtype: str  # "torch.bfloat16"
    value: WeightSum


def engine_sums(
    parameters: Iterable[tuple[str, Tensor]], parts: Mapping[str, Sequence[str]] | None = None
) -> list[EngineSum]:
    """Sum an engine's parameters, except empty ones, whose weights are stored elsewhere.

    Args:
        parameters: Named as in the engine.
        parts: Names of the pushed tensors in each of the engine's parameters; others are left out.
            None if the engine's names are those of the pushed tensors.
    """
    return [
        EngineSum((name,) if parts is None else tuple(parts[name]), str(t.dtype), WeightSum.of(t))
        for name, t in parameters
        if t.numel() and (parts is None or name in parts)
    ]


class PushedWeights:
    """Iterable over the weights of one push that sums them as the engine consumes them.

    Args:
        weights: Returns a new iterator over (Hugging Face name, full tensor) at each call.
        dtype: Dtype in which the engine stores them.
    """

    def __init__(
        self, weights: Callable[[], Iterable[tuple[str, Tensor]]], dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._sums: dict[str, WeightSum] = {}
        self._all_taken = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._all_taken = False
        for name, tensor in self._weights():
            value = self._sums[name] = WeightSum.of(tensor.detach().to(self._dtype))
            if not math.isfinite(value.norm):
                raise RunStoppedError(
                    f"weights to push: {name!r} is not finite in {self._dtype}, so the engine "
                    "would write rubbish; give the engine dtype float32, and look at the model if "
                    "that is its dtype"
                )
            yield name, tensor
            del tensor  # before the next is gathered
        self._all_taken = True

    def check(self, version: int, found: Sequence[EngineSum]) -> float:
        """Raise EngineMismatchError unless the engine holds the pushed weights.

        Parameters that the engine stores under other names or in another precision cannot be
        compared and are skipped. Returns the fraction of the pushed elements that were compared.
        """
        if not self._all_taken:
            raise EngineMismatchError(
                f"step {version}: the engine did not take the weights that were pushed, so it "
                "would sample from old ones; look at the engine's load_weights"
            )
        compared: set[str] = set()  # several servers may hold the same parameter
        for names, dtype, value in found:
            parts = [self._sums[name] for name in names if name in self._sums]
            if len(parts) < len(names) or dtype != str(self._dtype):
                continue
            pushed = WeightSum.combine(parts)
            if not pushed.equals(value):
                raise EngineMismatchError(
                    f"step {version}: after the push the engine's {names[0]!r} has norm "
                    f"{value.norm:.9g} and sum {value.total:.9g}, the trainer's {pushed.norm:.9g} "
                    f"and {pushed.total:.9g}; the engine holds other weights: restart the run, "
                    "and report the engine if it happens again"
                )
            compared.update(names)
        elements = sum(self._sums[name].elements for name in compared)
        return elements / max(1, sum(part.elements for part in self._sums.values()))
