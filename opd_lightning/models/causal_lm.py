"""Loading of Hugging Face causal language models, and their states per response token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from opd_lightning.errors import UserError
from opd_lightning.models.head import Head, TokenStates
from opd_lightning.models.source import ModelSource
from opd_lightning.terminal.library_bars import shown_as
from opd_lightning.types import RolloutBatch

Dtype = Literal["float32", "bfloat16", "float16"]


def load_causal_lm(
    source: ModelSource,
    *,
    dtype: Dtype,
    attn_implementation: str | None = None,
    empty: bool = False,
) -> Any:
    """Load the model of `source` in eval mode; an `empty` one has no weights (meta device).

    Raises:
        UserError: The weights in the folder are not exactly those of the architecture, so that
            some would stay random or unused.
    """
    from transformers import AutoModelForCausalLM

    how = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attn_implementation,
        "trust_remote_code": source.trust_remote_code,
    }
    if not empty:
        with shown_as(f"load {source.role}", "tensor"), _without_report():
            model, found = AutoModelForCausalLM.from_pretrained(
                source.path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                local_files_only=source.local_files_only,
                **how,
            )
        _check_complete(source, found)
        return model
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(source.config, **how).eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of tensors that do not fit, which `_check_complete` refuses."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _check_complete(source: ModelSource, found: Mapping[str, Any]) -> None:
    """Raise `UserError` unless every weight of the model was read, and every tensor used.

    Args:
        source: The model's folder.
        found: What transformers reports of loading it: sets of names by kind.
    """
    for kind, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape than config.json says"),
        ("unexpected_keys", "holds beside the architecture's own"),
    ):
        # Of a mismatch come the name and both shapes.
        keys = (key if isinstance(key, str) else key[0] for key in found.get(kind) or ())
        names = sorted(keys)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{source.role} {source.path!r}: its weights do not fit config.json: the folder "
                f"{what} tensor {names[0]!r}{more}; get the whole folder again, or set the "
                "architecture in config.json that the weights were saved from"
            )


class Reader(nn.Module):
    """Causal LM whose forward call is `response_states`, as teachers use it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RolloutBatch, view: str) -> TokenStates:
        return response_states(self.model, batch, view)


def response_states(model: Any, batch: RolloutBatch, view: str) -> TokenStates:
    """Run the backbone under one view and keep the positions that predict response tokens.

    Args:
        model: A causal LM, wrapped by peft or not.
        batch: The micro-batch; `hidden` is in the order of `batch.response_mask`.
        view: Name of the view in `batch.views` to run.
    """
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen = batch.views[view]
    backbone: nn.Module = getattr(lm, lm.base_model_prefix)
    hidden = backbone(
        input_ids=seen.input_ids, attention_mask=seen.attention_mask, use_cache=False
    ).last_hidden_state
    kept = hidden.flatten(0, 1)[seen.predicting_positions(batch.response_mask)]
    return TokenStates(kept, _head_of(lm, batch.temperature))


def _head_of(lm: Any, temperature: float) -> Head:
    """Return the head with the logit transforms that transformers applies after projecting."""
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    return Head(
        project=lm.get_output_embeddings(),
        vocab_size=config.vocab_size,
        temperature=temperature,
        scale=scale if scale is not None else 1.0 / divisor if divisor else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma 2 and 3
    )
