"""The model that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import Dtype, load_causal_lm, response_states
from opd_lightning.models.head import (
    Comparison,
    Divergence,
    HeadScores,
    TokenStates,
    TopLogprobs,
    score,
)
from opd_lightning.models.sharding import Sharding
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weights import check_mergeable, full_weights
from opd_lightning.types import RolloutBatch, TokenScores


class LateComparison(NamedTuple):
    """A comparison on the student's own likeliest tokens, with a teacher who must be told them."""

    top_k: int
    ask: Callable[[Tensor], TopLogprobs]  # the student's top ids [N, top_k] -> their log-probs
    function: Divergence


class Student(nn.Module):
    """A Hugging Face causal LM, trained whole or through LoRA.

    Args:
        path: Model folder or hub name.
        lora: peft's LoraConfig (r, lora_alpha, target_modules, ...); None trains all weights.
            Without dropout: what trains must be what samples.
        dtype: Of the weights. Keep float32 master weights and let `trainer.precision` choose the
            arithmetic.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        attn_implementation: transformers' attention kernel; None takes its default.
        trust_remote_code: Run code that ships with the model.
    """

    model: Any  # set by load()
    sharding: Sharding | None  # likewise; teachers in this process are sharded like the student

    def __init__(
        self,
        path: str,
        lora: LoraConfig | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if lora is not None and lora.lora_dropout:
            raise UserError(
                f"student.lora.lora_dropout: got {lora.lora_dropout}, expected 0, because the "
                "engine samples without dropout and the trainer must score the same policy"
            )
        self.source = ModelSource(path, trust_remote_code=trust_remote_code, role="student")
        self.lora = lora
        self.dtype: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.model = None
        self.sharding = None

    def load(self, sharding: Sharding | None = None) -> None:
        """Load the weights, once; with `sharding`, this process's part of them."""
        if self.model is not None:
            return
        self.sharding = sharding
        self.model = self.build(empty=sharding is not None and not sharding.reads)
        if sharding is not None:
            sharding.spread(self, compute_dtype=sharding.compute_dtype)
            register_fsdp_forward_method(self, "states")

    def build(self, *, empty: bool = False) -> Any:
        """The model at its start, LoRA included; an `empty` one has shapes alone."""
        model = load_causal_lm(
            self.source,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            empty=empty,
        )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.lora is not None:
            from peft import get_peft_model

            with torch.device("meta") if empty else nullcontext():
                model = get_peft_model(model, self.lora)
            check_mergeable(model)
        # transformers returns models in eval mode, where checkpointing does nothing.
        return _without_dropout(model.train())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor), LoRA merged: what an engine or an export wants."""
        return full_weights(self.model)

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Where the model predicts the response tokens, for a teacher who is the student itself."""
        return response_states(self.model, batch, view)

    def forward(
        self,
        batch: RolloutBatch,
        *,
        top_k: int = 0,
        comparisons: Mapping[str, Comparison | LateComparison] | None = None,
    ) -> HeadScores:
        """Backbone and head in one module call, so that sharding hooks see both.

        Flat `[N]` results, in the order of the response mask; see `head.score`. Late comparisons
        cost one more pass of the head, without a gradient.
        """
        states = response_states(self.model, batch, view="student")
        targets = batch.response_ids[batch.response_mask]
        wishes = comparisons or {}
        late = [wish.top_k for wish in wishes.values() if isinstance(wish, LateComparison)]
        if late:
            with torch.no_grad():
                ids = score(states, targets, top_k=max(late)).student.top_ids
        return score(
            states,
            targets,
            top_k=top_k,
            comparisons={
                name: Comparison(wish.ask(ids[:, : wish.top_k]), wish.function)
                if isinstance(wish, LateComparison)
                else wish
                for name, wish in wishes.items()
            },
        )

    def score(self, batch: RolloutBatch, *, top_k: int = 0) -> TokenScores:
        """Scores of the sampled tokens alone; the log-probs carry the gradient."""
        return TokenScores.unflatten(self(batch, top_k=top_k).student, batch)


def _without_dropout(model: Any) -> Any:
    """The policy that is scored and trained is the one that sampled, which had no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model
