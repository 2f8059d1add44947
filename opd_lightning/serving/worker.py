"""What a push needs inside vLLM's worker processes; for `--worker-extension-cls`."""

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
from opd_lightning.serving.vllm_process import repack_heads, sums_in_vllm, undo_reload

# vLLM looks here for what `opd serve` asks for; imported when the worker has its model.
WeightTransferEngineFactory.register_engine(
    TRANSFER_BACKEND, "opd_lightning.serving.transfer_receiver", "TransferEngine"
)


class PushWorker:
    """Mixed into vLLM's worker; its methods are called through the route /collective_rpc."""

    get_model: Any  # the worker's own
    reload_weights: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def load_pushed(self, folder: str) -> None:
        """Replace all weights by those of a folder of safetensors files, Hugging Face names."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no weights in {folder}; trainer and servers must share it")
        try:
            self.reload_weights(weights_iterator=_tensors(files))
        except BaseException:
            undo_reload(self.get_model())
            raise
        if not torch.cuda.is_available():
            repack_heads(self.get_model())

    def transfer_state(self) -> list[Any]:
        """The transfer group that this worker is in, if any, and its GPU, if it has one."""
        return [self.weight_transfer_engine.group, gpu_in_use()]

    def leave_transfer(self) -> None:
        """Leave the group, and forget a push that was broken off."""
        self._weight_update_active = False
        self.weight_transfer_engine.shutdown()
        undo_reload(self.get_model())

    def pushed_sums(self) -> list[Any]:
        """Sums of the weights that this worker has, as JSON can hold them."""
        return [[*one[:2], list(one.value)] for one in sums_in_vllm(self.get_model())]


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                yield name, stored.get_tensor(name)
