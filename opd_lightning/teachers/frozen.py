"""Frozen local teacher."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opd_lightning.models.causal_lm import Dtype, Reader, empty_causal_lm, load_causal_lm
from opd_lightning.models.compilation import check_compiler, compile_layers
from opd_lightning.models.head import TokenStates
from opd_lightning.models.packing import Packing
from opd_lightning.models.source import ModelSource
from opd_lightning.teachers.local import OwnModelTeacher
from opd_lightning.types import RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class FrozenTeacher(OwnModelTeacher):
    """Hugging Face causal LM that never changes.

    Args:
        path: Model folder or hub name.
        dtype: Dtype of weights and arithmetic; log-softmaxes are always float32.
        attn_implementation: transformers' attention kernel; None takes its default.
        trust_remote_code: Run code that ships with the model.
        offload: Keep the weights in CPU memory while rollouts are generated, and on the device
            only while a step is scored and trained. Costs one copy to the device per step. Not for
            runs that shard their models.
        chat_template: Jinja text or file that the teacher is taken to expect, instead of the
            folder's. Prompts are always rendered with the student's.
        eos_tokens: Tokens that end a response, instead of the folder's.
        packing: Whether a micro-batch is read as one row without padding, as for the student.
        compile: Compile the decoder layers with torch.compile, as for the student.
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        chat_template: str | None = None,
        eos_tokens: list[str] | None = None,
        packing: Packing = "auto",
        compile: bool = False,
    ) -> None:
        self.source: ModelSource = ModelSource(
            path,
            trust_remote_code=trust_remote_code,
            role="teacher",
            chat_template=chat_template,
            eos_tokens=eos_tokens,
        )
        self.dtype: Dtype = dtype
        self.attn_implementation = attn_implementation
        self.packing: Packing = packing
        self.is_compiled = compile
        self.offload = offload
        self._device: torch.device | None = None  # device of an offloaded model's copy
        self._device_copy: Reader | None = None  # copy on the device

    def check_model(self, student: Student) -> None:
        if self.is_compiled:
            check_compiler()
        if self._reader is None:
            self._build(empty=True)

    def load(self, device: torch.device, student: Student) -> None:
        if self._reader is not None:
            return
        sharding = self._sharding = student.sharding
        # Lightning calls this where new tensors are made on the device.
        with torch.device("cpu") if self.offload else nullcontext():
            model = self._build(empty=sharding is not None and not sharding.reads)
        self._reader = Reader(model).eval().requires_grad_(False)
        if sharding is not None:
            sharding.shard(self._reader)
        elif self.offload:
            self._device = device
        else:
            self._reader.to(device)

    def describe(self, student: Student) -> None:
        self._reader = Reader(self._build(empty=True, stored=False))

    def _build(self, *, empty: bool, stored: bool = True) -> Any:
        make = partial(empty_causal_lm, stored=stored) if empty else load_causal_lm
        model = make(
            self.source,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            packing=self.packing,
        )
        if self.is_compiled:
            compile_layers(model)
        return model

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        """Return scores of the response tokens; padding of a larger head than its own is -inf."""
        size = self.source.config.get_text_config().vocab_size
        # Read from the lists, which needs no synchronisation with a GPU.
        if all(max(rollout.response_ids, default=0) < size for rollout in batch.rollouts):
            return super().score(batch, view, top_k=top_k)
        unknown = batch.response_ids >= size
        scores = super().score(_within(size, batch, view), view, top_k=top_k)
        return replace(scores, logprobs=scores.logprobs.masked_fill(unknown, -torch.inf))

    def release(self) -> None:
        super().release()
        if self._device_copy is not None:  # frozen weights need not be copied back
            self._device_copy = None
            torch.cuda.empty_cache()

    def _read(self, batch: RolloutBatch, view: str) -> TokenStates:
        if self._device is None:
            return super()._read(batch, view)
        if self._device_copy is None:
            assert self._reader is not None
            self._device_copy = _copy_to(self._device, self._reader)
            if self.is_compiled:  # which copies are not
                compile_layers(self._device_copy.model)
        states: TokenStates = self._device_copy(batch, view)
        return states


def _within(size: int, batch: RolloutBatch, view: str) -> RolloutBatch:
    """Return a batch of which one view has no token ids from `size` on."""
    seen = batch.views[view]
    within = replace(seen, input_ids=seen.input_ids.clamp(max=size - 1))
    ids = batch.response_ids.clamp(max=size - 1)
    return replace(batch, response_ids=ids, views={**batch.views, view: within})


def _copy_to(device: torch.device, model: Reader) -> Reader:
    """Return a copy of `model` on `device`; deepcopy takes the tensors from its memo."""
    memo: dict[int, Any] = {id(x): x.to(device) for x in model.buffers()}
    for x in model.parameters():
        memo[id(x)] = nn.Parameter(x.to(device), requires_grad=False)
    return deepcopy(model, memo)
