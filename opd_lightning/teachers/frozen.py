"""A frozen local model as teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source: ModelSource = ModelSource(
            path, trust_remote_code=trust_remote_code, role="teacher"
        )
        self.dtype: Dtype = dtype
        self.attn_implementation = attn_implementation
        self._model: Any = None

    def load(self, device: torch.device, student: Student) -> None:
        if self._model is None:
            self._model = load_causal_lm(
                self.source, dtype=self.dtype, attn_implementation=self.attn_implementation
            )
            self._model.eval().requires_grad_(False)
        self._model.to(device)

    def model(self) -> Any:
        return self._model
