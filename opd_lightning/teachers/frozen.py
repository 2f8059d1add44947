"""A frozen local model as teacher."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opd_lightning.causal_lm import Dtype, load_causal_lm
from opd_lightning.model_source import ModelSource
from opd_lightning.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from opd_lightning.student import Student


class FrozenTeacher(LocalTeacher):
    """A Hugging Face causal LM that never changes.

    Not an `nn.Module`, so that Lightning neither trains nor checkpoints it.

    Args:
        path: Model folder or hub name.
        dtype: Of weights and arithmetic; log-softmaxes are float32 whatever it is.
        attn_implementation: transformers' attention kernel; None takes its default.
        trust_remote_code: Run code that ships with the model.
        offload: Keep the weights in CPU memory and on the device only while a step is scored and
            trained, not while it is generated. Costs one copy to the device per step.
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
    ) -> None:
        self.source: ModelSource = ModelSource(
            path, trust_remote_code=trust_remote_code, role="teacher"
        )
        self.dtype: Dtype = dtype
        self.attn_implementation = attn_implementation
        self.offload = offload
        self._model: Any = None
        self._twin: Any = None  # an offloaded model's copy on the device

    def load(self, device: torch.device, student: Student) -> None:
        if self._model is None:
            self._model = load_causal_lm(
                self.source, dtype=self.dtype, attn_implementation=self.attn_implementation
            )
            self._model.eval().requires_grad_(False)
        self._device = device
        if not self.offload:
            self._model.to(device)

    def model(self) -> Any:
        if not self.offload:
            return self._model
        if self._twin is None:
            # What deepcopy finds in its memo it takes for the copy: no weight is copied twice.
            copies: dict[int, Any] = {id(x): x.to(self._device) for x in self._model.buffers()}
            for x in self._model.parameters():
                copies[id(x)] = nn.Parameter(x.to(self._device), requires_grad=False)
            self._twin = deepcopy(self._model, copies)
        return self._twin

    def rest(self) -> None:
        """Drop the copy on the device: frozen weights need not be copied back."""
        self._twin = None
        if self.offload and self._device.type == "cuda":
            torch.cuda.empty_cache()
