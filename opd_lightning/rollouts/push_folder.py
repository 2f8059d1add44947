"""Weights on their way to servers: a folder that the trainer writes and every server reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.rollouts.push import Push
from opd_lightning.serving.client import Servers

SHARD_BYTES = 2 * 1024**3  # the most that is held in memory beside the model


class PushFolder(Push):
    """Holds one version of the weights at most, in safetensors files under Hugging Face names.

    Whether the servers see the folder shows at the first push.

    Args:
        folder: The same path for the trainer and every server; no other run may push through it.
        dtype: Of the tensors written.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder = folder.absolute()
        self._dtype = dtype

    def start(self, servers: Servers, shapes: Mapping[str, torch.Size]) -> None:
        """Nothing of an earlier run is left there."""
        self._servers = servers
        self.clear()

    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write them once; every server loads them from there."""
        written = self.write(label, weights)
        self._servers.everywhere("/update_weight_version", {"new_version": label})
        body = {"method": "load_pushed", "args": [str(written)]}
        self._servers.everywhere("/collective_rpc", body)

    def close(self) -> None:
        """Delete what was pushed."""
        self.clear()

    def write(self, version: str, weights: Iterable[tuple[str, Tensor]]) -> Path:
        """Write a version in place of the one before and return its folder.

        It appears under its name when it is complete.
        """
        try:
            return self._write(version, weights)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"engine.push_folder: cannot write to {str(self._folder)!r}: {error}; give a "
                "folder with room for the model"
            ) from error

    def clear(self) -> None:
        """Delete what was pushed, also what a run that died has left."""
        for pattern in ("draft-*", "weights-*"):
            for old in self._folder.glob(pattern):
                shutil.rmtree(old)

    def _write(self, version: str, weights: Iterable[tuple[str, Tensor]]) -> Path:
        self.clear()
        draft = self._folder / f"draft-{version}"
        draft.mkdir(parents=True)
        shard: dict[str, Tensor] = {}
        count = size = 0
        for name, tensor in weights:
            shard[name] = tensor.to("cpu", self._dtype).contiguous()
            size += shard[name].nbytes
            if size >= SHARD_BYTES:
                save_file(shard, draft / f"{count:05}.safetensors")
                shard, count, size = {}, count + 1, 0
        if shard:
            save_file(shard, draft / f"{count:05}.safetensors")
        return draft.rename(self._folder / f"weights-{version}")
