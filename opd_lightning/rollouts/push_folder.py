"""Weight pushes through a folder that the trainer writes and every server reads."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd_lightning.errors import UserError, reason_of
from opd_lightning.rollouts.push import Push
from opd_lightning.serving.client import Servers

log = logging.getLogger(__name__)

SUBFOLDER = "opd-pushed-weights"  # our part of `push_folder`, which may hold other files
SHARD_BYTES = 2 * 1024**3  # maximum held in memory in addition to the model


class PushFolder(Push):
    """Push through a folder with one version of the weights: safetensors, Hugging Face names.

    Everything is written to its subfolder `opd-pushed-weights`, which is deleted as a whole. A
    folder that the servers cannot see is only detected at the first push.

    Args:
        folder: The same path for the trainer and every server; no other run may push through it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute() / SUBFOLDER

    def start(self, servers: Servers, tensors: Mapping[str, Tensor]) -> None:
        """Delete what an earlier run has left."""
        self._servers = servers
        self._tensors = tensors
        with self._explained():
            self.clear()

    def send(self, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the weights once and make every server load them."""
        written = self.write(label, weights)
        self._servers.post_all("/update_weight_version", {"new_version": label})
        body = {"method": "load_pushed", "args": [str(written)]}
        self._servers.post_all("/collective_rpc", body)

    def close(self) -> None:
        """Delete the pushed weights; if that fails, leave them with a warning: the run is over."""
        try:
            self.clear()
        except OSError as error:
            log.warning("pushed weights are left in '%s': %s", self._folder, reason_of(error))

    def write(self, version: str, weights: Iterable[tuple[str, Tensor]]) -> Path:
        """Write a version, replacing the previous one, and return its folder.

        The folder is renamed to its final name once it is complete.
        """
        with self._explained():
            self.clear()
            draft = self._folder / f"draft-{version}"
            draft.mkdir(parents=True)
            shard: dict[str, Tensor] = {}
            count = size = 0
            for name, tensor in weights:
                shard[name] = tensor.to("cpu", self._tensors[name].dtype).contiguous()
                size += shard[name].nbytes
                if size >= SHARD_BYTES:
                    save_file(shard, draft / f"{count:05}.safetensors")
                    shard, count, size = {}, count + 1, 0
            if shard:
                save_file(shard, draft / f"{count:05}.safetensors")
            return draft.rename(self._folder / f"weights-{version}")

    def clear(self) -> None:
        """Delete pushed weights, including those of killed runs."""
        if self._folder.is_dir():
            shutil.rmtree(self._folder)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"engine.push_folder: cannot write to {str(self._folder)!r}: {reason_of(error)}; "
                "give a folder of your own, with room for the model"
            ) from error
