"""The student model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from opd_lightning.errors import UserError
from opd_lightning.losses.truncation import KeptMass
from opd_lightning.models.causal_lm import (
    Dtype,
    empty_causal_lm,
    load_causal_lm,
    response_states,
)
from opd_lightning.models.compilation import check_compiler, compile_layers
from opd_lightning.models.folder_format import stored_tensors
from opd_lightning.models.groups import GroupComparison
from opd_lightning.models.head import (
    Comparison,
    Divergence,
    HeadScores,
    TokenStates,
    TopLogprobs,
    score,
)
from opd_lightning.models.lora import check_lora, with_lora
from opd_lightning.models.packing import Packing, is_packed
from opd_lightning.models.sharding import Sharding
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weights import full_weights
from opd_lightning.processes import world_size
from opd_lightning.types import RolloutBatch, TokenScores

KEPT_MASS = "kept_mass"  # name of the comparison that is added for a truncated sampler


class LateComparison(NamedTuple):
    """Comparison on the student's top-k tokens, whose ids the teacher needs to score them."""

    top_k: int
    ask: Callable[[Tensor], TopLogprobs]  # the student's top ids [N, top_k] -> their log-probs
    function: Divergence


class Student(nn.Module):
    """Hugging Face causal LM that is trained fully or through LoRA.

    Args:
        path: Model folder or hub name.
        lora: peft's LoraConfig (r, lora_alpha, target_modules, ...); None trains all weights.
            Dropout must be 0: the trained policy must be the one that samples.
        dtype: Of the weights. Keep float32 master weights and set the precision of computations
            with `trainer.precision`.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        attn_implementation: transformers' attention kernel; None uses its default.
        packing: Read a micro-batch as one row without padding: "auto" on GPUs with flash attention,
            "on" with any attention kernel.
        compile: Compile the decoder layers with torch.compile, which takes a minute or more at the
            first step.
        trust_remote_code: Run code that ships with the model.
        chat_template: Jinja text or file, used instead of the folder's; exported with the student.
        eos_tokens: Tokens that end a response, instead of the folder's EOS; exported likewise.
    """

    model: Any  # set by load()
    sharding: Sharding | None  # set by load(); local teachers are sharded like the student

    def __init__(
        self,
        path: str,
        lora: LoraConfig | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        eos_tokens: list[str] | None = None,
        packing: Packing = "auto",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if lora is not None:
            check_lora(lora)
        self.source = ModelSource(
            path,
            trust_remote_code=trust_remote_code,
            role="student",
            chat_template=chat_template,
            eos_tokens=eos_tokens,
        )
        self.lora = lora
        self.dtype: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.packing: Packing = packing
        self.is_compiled = compile
        self.model = None
        self.sharding = None

    def load(self, sharding: Sharding | None = None) -> None:
        """Load the weights, once; with `sharding`, the shard of this process."""
        if self.model is not None:
            return
        self.sharding = sharding
        self.model = self.build(empty=sharding is not None and not sharding.reads)
        list(stored_tensors(self.model))  # refuses a state that an export would lack
        if sharding is not None:
            sharding.shard(self, compute_dtype=sharding.compute_dtype)
            register_fsdp_forward_method(self, "states")
        elif self.lora is not None and world_size() > 1:
            # Random generators of processes may differ. DDP broadcasts too, but only after an EMA
            # teacher has copied the student.
            for name, parameter in self.named_parameters():
                if ".lora_" in name:
                    dist.broadcast(parameter.detach(), src=0)

    def check(self) -> None:
        """Raise UserError, before weights load, if the model cannot be built or adapted."""
        if self.is_compiled:
            check_compiler()
        if self.model is None:
            self.build(empty=True)

    def describe(self) -> None:
        """Build the model on the meta device, instead of loading it; config.json is enough."""
        self.model = self.build(empty=True, stored=False)

    def build(self, *, empty: bool = False, stored: bool = True) -> Any:
        """Build the initial model, LoRA included.

        Args:
            empty: On the meta device.
            stored: Whether its weights are there; without them it can only be empty.
        """
        make = partial(empty_causal_lm, stored=stored) if empty else load_causal_lm
        model = make(
            self.source,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            training=True,
            packing=self.packing,
        )
        if self.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise UserError(
                    f"student.gradient_checkpointing: got true, which {type(model).__name__} does "
                    "not support; leave it out"
                )
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.is_compiled:
            compile_layers(model)
        if self.lora is not None:
            with torch.device("meta") if empty else nullcontext():
                model = with_lora(model, self.lora, empty=empty)
        return model

    @property
    def is_packed(self) -> bool:
        """Return whether the loaded model reads micro-batches without padding."""
        lm = self.model.get_base_model() if self.lora is not None else self.model
        return is_packed(lm, next(self.parameters()).device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (Hugging Face name, full tensor), LoRA merged, for engines and exports."""
        return full_weights(self.model)

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Compute the states of the response tokens if the student is its own teacher."""
        return response_states(self.model, batch, view)

    def forward(
        self,
        batch: RolloutBatch,
        *,
        top_k: int = 0,
        comparisons: Mapping[str, Comparison | LateComparison | GroupComparison] | None = None,
    ) -> HeadScores:
        """Run backbone and head in one module call, so that sharding hooks cover both.

        Results are flat, `[N]`, in the order of the response mask; see `head.score`. Late
        comparisons cost one more pass of the head, without gradients, and comparisons of groups one
        over the tokens that do not end their group. For a truncated sampler the values include the
        log mass that it draws from, see `token_scores`.
        """
        states = response_states(self.model, batch, view="student")
        targets = batch.response_ids[batch.response_mask]
        requested = dict(comparisons or {})
        if batch.top_p < 1 or batch.top_k > 0:
            requested[KEPT_MASS] = Comparison(None, KeptMass(batch.top_p, batch.top_k))
        groups = {n: one for n, one in requested.items() if isinstance(one, GroupComparison)}
        for name, group in groups.items():
            requested |= group.comparisons(name, states, targets)
        late = [one.top_k for one in requested.values() if isinstance(one, LateComparison)]
        if late:
            with torch.no_grad():
                ids = score(states, targets, top_k=max(late)).student.top_ids
        scores = score(
            states,
            targets,
            top_k=top_k,
            comparisons={
                name: Comparison(one.ask(ids[:, : one.top_k]), one.function)
                if isinstance(one, LateComparison)
                else one
                for name, one in requested.items()
                if not isinstance(one, GroupComparison)
            },
        )
        for name, group in groups.items():
            scores = group.complete(name, scores)
        return scores

    def score(self, batch: RolloutBatch, *, top_k: int = 0) -> TokenScores:
        """Score the sampled tokens without comparisons; the log-probs carry the gradient."""
        return token_scores(self(batch, top_k=top_k), batch)


def token_scores(scores: HeadScores, batch: RolloutBatch) -> TokenScores:
    """Return the student's scores `[B, R]`, with the log mass of a truncated sampler."""
    found = TokenScores.unflatten(scores.student, batch)
    mass = scores.values.get(KEPT_MASS)
    return found if mass is None else replace(found, log_mass=batch.unflatten(mass.detach()))
