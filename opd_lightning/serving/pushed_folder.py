"""Validation of pushed weights. vLLM silently keeps old tensors where new ones are missing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from opd_lightning.errors import reason_of
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.models.source import ModelSource
from opd_lightning.serving.accepted import RefusedError


class PushedFolder:
    """Shapes of a model's tensors, which every pushed folder must hold.

    Args:
        source: The model that is served.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._shapes: dict[str, list[int]] = {}

    def check(self, folder: str) -> None:
        """Raise RefusedError unless the folder holds each tensor once, in its shape."""
        if not self._shapes:  # transformers is imported here, which takes seconds
            tensors = FolderFormat.of(self._source, torch.float32).tensors
            self._shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        missing = dict(self._shapes)
        for name, shape in _stored(Path(folder)):
            if name not in missing:
                problem = "came twice" if name in self._shapes else "is not a tensor of this model"
                raise RefusedError(f"args: {folder!r}: {name!r} {problem}")
            if shape != missing.pop(name):
                raise RefusedError(
                    f"args: {folder!r}: {name!r} has shape {shape}, expected {self._shapes[name]}"
                )
        if missing:
            raise RefusedError(
                f"args: {folder!r}: {len(missing)} of {len(self._shapes)} tensors are missing, "
                f"{min(missing)!r} among them"
            )


def _stored(folder: Path) -> list[tuple[str, list[int]]]:
    """Return names and shapes of the tensors in a folder; raise RefusedError if it has none."""
    try:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise RefusedError(
                f"args: no weights in {str(folder)!r}; trainer and servers must share the folder"
            )
        found = []
        for file in files:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    found.append((name, list(stored.get_slice(name).get_shape())))
    except (OSError, SafetensorError) as error:
        raise RefusedError(f"args: {str(folder)!r} cannot be read: {reason_of(error)}") from error
    return found
