"""Worker extension for weight pushes (vLLM's `--worker-extension-cls`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from opd_lightning.serving.serve import TRANSFER_BACKEND
from opd_lightning.serving.transfer_client import gpu_in_use
from opd_lightning.serving.vllm_process import repack, undo_reload
from opd_lightning.serving.vllm_sums import sums_in_vllm

# `opd serve` selects this backend; vLLM imports this module once the worker has its model.
WeightTransferEngineFactory.register_engine(
    TRANSFER_BACKEND, "opd_lightning.serving.transfer_receiver", "TransferEngine"
)


class PushWorker:
    """Mixin for vLLM's worker; its methods are called through the route /collective_rpc."""

    get_model: Any  # provided by the worker
    reload_weights: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def load_pushed(self, folder: str) -> None:
        """Replace all weights by a folder of safetensors files with Hugging Face names."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no weights in {folder}; trainer and servers must share it")
        try:
            self.reload_weights(weights_iterator=_tensors(files))
        except BaseException:
            undo_reload(self.get_model())
            raise
        if not torch.cuda.is_available():
            repack(self.get_model())

    def transfer_state(self) -> list[Any]:
        """Return this worker's transfer group and the UUID of its GPU; None where it has none."""
        return [self.weight_transfer_engine.group, gpu_in_use()]

    def leave_transfer(self) -> None:
        """Leave the group and discard an aborted push."""
        self._weight_update_active = False
        self.weight_transfer_engine.shutdown()
        undo_reload(self.get_model())

    def pushed_sums(self, stored: Sequence[str]) -> list[Any]:
        """Return the sums of this worker's weights, in types that JSON can hold.

        `stored` are the names of all pushed tensors.
        """
        return [[*one[:2], list(one.value)] for one in sums_in_vllm(self.get_model(), stored)]


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                yield name, stored.get_tensor(name)
