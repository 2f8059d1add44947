"""The tensors of a model as its folder stores them: the names and shapes that vLLM loads.

transformers renames tensors and fuses others, such as those of experts, when it reads a folder, and
undoes that when it writes one. A push does the same, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import empty_causal_lm
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import EngineSum


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of a model: parameters, tied ones once, and persistent buffers.

    Yields the model's own tensors under the names of its `state_dict`.

    Raises:
        UserError: The state dict has entries that no folder stores; a reload would lose them.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"{type(model).__name__}: {name!r} in its state is no tensor, so neither an export "
                "nor an engine would have it; use a model whose state is tensors"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def empty_tensors(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of `stored_tensors` on the meta device; parameters in `dtype`.

    Buffers, such as a router's bias, keep their precision: floating ones are float32.
    """
    parameters = {id(parameter) for parameter in model.parameters()}

    def kind(tensor: Tensor) -> torch.dtype:
        if id(tensor) in parameters:
            return dtype
        return torch.float32 if tensor.is_floating_point() else tensor.dtype

    return {
        name: torch.empty_like(tensor, dtype=kind(tensor), device="meta")
        for name, tensor in stored_tensors(model)
    }


class FolderFormat:
    """Conversion of a model's tensors to those of its folder, one at a time where possible.

    Args:
        model: A causal LM without weights (meta device).
        dtype: Dtype of the parameters that are converted.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self.expected = empty_tensors(model, dtype)  # by the model's names
        self.shapes = {name: tensor.shape for name, tensor in self.expected.items()}
        whole = self._revert(self.expected)
        changed = {n: t for n, t in self.expected.items() if whole.get(n) is not t}
        self._groups = _groups({n: self._revert({n: t}) for n, t in changed.items()})
        # In the order of `convert`; on the meta device.
        self.tensors: dict[str, Tensor] = {}
        self._origins: dict[str, tuple[str, ...]] = {}  # the model's tensors in one of the folder
        for names, converted in self._convert(self.expected.items()):
            self.tensors.update(converted)
            self._origins.update(dict.fromkeys(converted, names))
        if _described(self.tensors) != _described(whole):
            raise UserError(
                f"{type(model).__name__}: its weights cannot be converted to the names of its "
                "folder one by one; use opd_lightning.rollouts.HFEngine"
            )

    @classmethod
    def of(cls, source: ModelSource, dtype: torch.dtype) -> FolderFormat:
        """Build from a folder's configuration; allocates no memory."""
        return cls(empty_causal_lm(source, dtype="float32"), dtype)

    def convert(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Convert (name, tensor) pairs of the model to those of its folder."""
        for _, converted in self._convert(weights):
            yield from converted.items()
            del converted  # before the next is gathered

    def in_model(self, sums: Iterable[EngineSum]) -> list[EngineSum]:
        """Map sums over the folder's tensors to the model's tensor names.

        Sums over a part of one of the model's tensors are left out.
        """
        stored: dict[str, set[str]] = {}  # by the model's names
        for name, origins in self._origins.items():
            for origin in origins:
                stored.setdefault(origin, set()).add(name)
        found = []
        for one in sums:
            names = dict.fromkeys(n for part in one.names for n in self._origins.get(part, ()))
            if names and set().union(*(stored[name] for name in names)) == set(one.names):
                found.append(one._replace(names=tuple(names)))
        return found

    def _convert(
        self, weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
        """Yield the names of the model's tensors that belong together, and the folder's tensors."""
        waiting: dict[str, Tensor] = {}
        for name, tensor in weights:
            group = self._groups.get(name)
            if group is None:  # stored as it is
                yield (name,), {name: tensor}
                del tensor
                continue
            waiting[name] = tensor
            del tensor
            if all(one in waiting for one in group):
                yield group, self._revert({one: waiting.pop(one) for one in group})

    def _revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, dict(tensors)))


def _groups(alone: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """Return, for each tensor that needs a conversion, those that must be converted with it.

    Args:
        alone: Each tensor's conversion without the others; those that need them have one name.
    """
    by_result: dict[str, list[str]] = {}
    for name, converted in alone.items():
        for result in converted:
            by_result.setdefault(result, []).append(name)
    return {name: tuple(members) for members in by_result.values() for name in members}


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
