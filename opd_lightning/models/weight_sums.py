"""Proof that a push arrived: sums over the weights, before and after.

A log-prob gap shows weights that differ much. At a learning rate of 1e-6 and in bfloat16 one
missed push does not show in it; in sums over all elements, taken in float64, it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from opd_lightning.errors import EngineMismatchError, RunStoppedError

RESOLUTION = 1e-10  # relative rounding of a float64 sum over a whole matrix, generously
PART = 2**24  # elements that are summed at once: PyTorch turns all of them into float64 first


class WeightSum(NamedTuple):
    """What is left of a tensor when its layout does not matter: fusing and padding keep it."""

    total: float  # sum of the elements
    norm: float  # Euclidean
    elements: int  # padding included

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        parts = tensor.detach().reshape(-1).split(PART)
        totals = [part.sum(dtype=torch.float64) for part in parts]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        total, norm = torch.stack(totals).sum(), torch.linalg.vector_norm(torch.stack(norms))
        return cls(float(total), float(norm), tensor.numel())

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """Of several tensors put side by side."""
        return cls(
            sum(part.total for part in parts),
            math.hypot(*(part.norm for part in parts)),
            sum(part.elements for part in parts),
        )

    def equals(self, other: Self) -> bool:
        """Up to float64 rounding; NaN equals nothing."""
        scale = RESOLUTION * max(self.norm, other.norm)
        same_total = abs(self.total - other.total) <= scale * math.sqrt(self.elements)
        return same_total and abs(self.norm - other.norm) <= scale


class EngineSum(NamedTuple):
    """One of the engine's own parameters."""

    names: tuple[str, ...]  # the Hugging Face parameters it holds; a fused layer holds several
    dtype: str  # "torch.bfloat16"
    value: WeightSum


def engine_sums(
    parameters: Iterable[tuple[str, Tensor]], fused: Mapping[str, Sequence[str]]
) -> list[EngineSum]:
    """Sums of an engine's parameters; empty ones, whose weights lie elsewhere, are left out.

    Args:
        parameters: By the engine's names.
        fused: Modules that the engine has in one where Hugging Face has several, by name.
    """
    return [
        EngineSum(_unfused(name, fused), str(tensor.dtype), WeightSum.of(tensor))
        for name, tensor in parameters
        if tensor.numel()
    ]


def _unfused(name: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    for whole, parts in fused.items():
        before, found, after = name.partition(f".{whole}.")
        if found:
            return tuple(f"{before}.{part}.{after}" for part in parts)
    return (name,)


class PushedWeights:
    """The weights of one push on their way to the engine, added up as they pass.

    Args:
        weights: Each call begins anew: (Hugging Face name, full tensor), one at a time.
        dtype: That the engine keeps them in.
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
        """Raise EngineMismatchError unless the engine holds what was pushed.

        Parameters that the engine stores under other names or in another precision prove nothing
        and are passed over. Returns the share of the pushed elements that were compared.
        """
        if not self._all_taken:
            raise EngineMismatchError(
                f"step {version}: the engine did not take the weights that were pushed, so it "
                "would sample from old ones; look at the engine's load_weights"
            )
        compared: set[str] = set()  # several servers hold the same
        for names, dtype, value in found:
            parts = [self._sums[name] for name in names if name in self._sums]
            if len(parts) < len(names) or dtype != str(self._dtype):
                continue
            pushed = WeightSum.together(parts)
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
