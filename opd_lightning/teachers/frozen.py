"""A frozen local model as teacher."""

from __future__ import annotations

from typing import Any

import torch

from opd_lightning.causal_lm import Dtype, load_causal_lm, response_states
from opd_lightning.head import TokenStates, score_tokens
from opd_lightning.model_source import ModelSource
from opd_lightning.teachers.base import DistributionTeacher
from opd_lightning.types import RolloutBatch, TokenScores


class FrozenTeacher(DistributionTeacher):
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
        self.source = ModelSource(path, trust_remote_code=trust_remote_code, role="teacher")
        self.dtype: Dtype = dtype
        self.attn_implementation = attn_implementation
        self._model: Any = None

    def load(self, device: torch.device) -> None:
        if self._model is None:
            self._model = load_causal_lm(
                self.source, dtype=self.dtype, attn_implementation=self.attn_implementation
            )
            self._model.eval().requires_grad_(False)
        self._model.to(device)

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        # Autocast is the student's business: a teacher answers in its own dtype.
        device_type = batch.response_ids.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return response_states(self._model, batch, view)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        states = self.states(batch, view)
        targets = batch.response_ids[batch.response_mask]
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            return TokenScores.unflatten(score_tokens(states, targets, top_k=top_k), batch)
