"""Loading of Hugging Face causal language models, and their states per response token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from opd_lightning.errors import UserError, reason_of
from opd_lightning.models.compilation import uncompiled
from opd_lightning.models.folder import Tensors, check_weights
from opd_lightning.models.head import TokenStates
from opd_lightning.models.packing import (
    PackedRow,
    Packing,
    check_packing,
    is_packed,
    set_packing,
)
from opd_lightning.models.readout import (
    check_logits,
    measure,
    readout_of,
    train_without_noise,
)
from opd_lightning.models.source import ModelSource
from opd_lightning.terminal.library_bars import shown_as
from opd_lightning.types import RolloutBatch

Dtype = Literal["float32", "bfloat16", "float16"]


def load_causal_lm(
    source: ModelSource,
    *,
    dtype: Dtype,
    attn_implementation: str | None = None,
    training: bool = False,
    packing: Packing = "off",
) -> Any:
    """Load the model of `source`.

    It is in eval mode or, with `training`, in training mode without dropout: the policy that is
    trained must be the one that sampled.

    Raises:
        UserError: The architecture or the folder cannot be used; or its weights are not exactly
            those of the architecture, so that some would stay random or unused; or log-probs
            would not be the model's own.
    """
    from transformers import AutoModelForCausalLM

    _check_kind(source)
    _check_files(source)
    with (
        shown_as(f"load {source.role}", "tensor"),
        _without_report(),
        _explained(source, "cannot load its weights"),
    ):
        model, found = AutoModelForCausalLM.from_pretrained(
            source.path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            local_files_only=source.local_files_only,
            **_settings(source, dtype, attn_implementation),
        )
    _check_complete(source, found)
    _settle_quantization(source, model, training=training)
    with _explained(source, "cannot use it"):
        model.opd_readout = measure(model)
        set_packing(model, packing)
        check_logits(model, attention=attn_implementation, training=training)
        if model.opd_packing != "off":
            check_packing(model, attention=attn_implementation)
        from opd_lightning.models.shared_prompts import check_sharing  # imports transformers

        check_sharing(model, attention=attn_implementation)
    if training:
        train_without_noise(model)
    return model


def empty_causal_lm(
    source: ModelSource,
    *,
    dtype: Dtype,
    attn_implementation: str | None = None,
    training: bool = False,
    packing: Packing = "off",
    stored: bool = True,
) -> Any:
    """Build what `load_causal_lm` loads without its weights, on the meta device.

    Args:
        source: The model's folder or hub name.
        dtype: Of its weights.
        attn_implementation: transformers' attention kernel.
        training: Without dropout, in training mode.
        packing: As for `load_causal_lm`.
        stored: Whether its weights are there, and are compared; else config.json is enough.

    Raises:
        UserError: What can be known before weights load: the architecture or the folder cannot be
            used, or tensors in safetensors files have other shapes.
    """
    from transformers import AutoModelForCausalLM

    _check_kind(source)
    tensors = _check_files(source) if stored else {}
    with _explained(source, "cannot build what config.json describes"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            source.config, **_settings(source, dtype, attn_implementation)
        ).eval()
    _check_tensors(source, model, tensors)
    with _explained(source, "cannot use it"):
        model.opd_readout = measure(model)
        set_packing(model, packing)
    if training:
        train_without_noise(model)
    return model


def _settings(source: ModelSource, dtype: Dtype, attention: str | None) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attention,
        "trust_remote_code": source.trust_remote_code,
    }


def _check_files(source: ModelSource) -> Tensors:
    """Check the weight files; return what tensors they hold, as far as known."""
    stored = check_weights(source.folder, source.role) if source.folder else {}
    layers = getattr(source.config.get_text_config(), "num_hidden_layers", 0)
    if stored and layers > len(stored):  # building that many may take minutes
        raise UserError(
            f"{source.role} {source.path!r}: its weights do not fit config.json: num_hidden_layers "
            f"is {layers}, and the folder holds {len(stored)} tensors; get the file again"
        )
    return stored


def _check_kind(source: ModelSource) -> None:
    """Raise UserError for architectures that are no causal language models of text."""
    config = source.config
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{source.role} {source.path!r}: {kind} has an encoder, but prompts are read by the "
            "decoder alone; use a causal language model"
        )
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_code:
        raise UserError(
            f"{source.role} {source.path!r}: transformers has no causal language model of text "
            f"for {kind} (model_type {config.model_type}); use another model"
        )


@contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Raise UserError, in one line, for any error of the libraries except lack of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except UserError as error:
        raise UserError(f"{source.role} {source.path!r}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(f"{source.role} {source.path!r}: {what} ({reason})") from error


def _check_tensors(source: ModelSource, model: Any, stored: Tensors) -> None:
    """Raise UserError if a tensor in the folder has another shape or kind than in the model."""
    expected = model.state_dict()
    is_quantized = getattr(source.config, "quantization_config", None) is not None
    for name in sorted(stored.keys() & expected.keys()):
        dtype, shape = stored[name]
        if shape != tuple(expected[name].shape):
            raise UserError(
                f"{source.role} {source.path!r}: its weights do not fit config.json: {name!r} has "
                f"shape {list(shape)}, expected {list(expected[name].shape)}; set vocab_size and "
                "the like to those that the weights were saved with"
            )
        is_integer = dtype == "BOOL" or dtype.startswith(("I", "U"))
        if is_integer and expected[name].is_floating_point() and not is_quantized:
            raise UserError(
                f"{source.role} {source.path!r}: {name!r} is stored as {dtype}, expected a "
                "floating-point type, since config.json names no quantization; get the weights "
                "again"
            )


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
        # A mismatched key is a tuple of its name and both shapes.
        keys = (key if isinstance(key, str) else key[0] for key in found.get(kind) or ())
        names = sorted(keys)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{source.role} {source.path!r}: its weights do not fit config.json: the folder "
                f"{what} tensor {names[0]!r}{more}; get the whole folder again, or set the "
                "architecture in config.json that the weights were saved from"
            )


def _settle_quantization(source: ModelSource, model: Any, *, training: bool) -> None:
    """Have a model that was dequantized saved as it is. Refuse to train one that was not."""
    if getattr(source.config, "quantization_config", None) is None:
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        model._weight_conversions = None  # as read, which would quantize the weights on saving
    elif training:
        method = quantizer.quantization_config.quant_method
        raise UserError(
            f"{source.role} {source.path!r}: its weights stay quantized on this machine "
            f"({getattr(method, 'value', method)}), expected floating-point weights to train; give "
            "the folder of the model that is not quantized"
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
    readout = readout_of(lm)
    backbone: nn.Module = lm.get_submodule(readout.backbone)
    head = readout.head(lm, batch.temperature)
    from opd_lightning.models.shared_prompts import shared_prompts

    if shared := shared_prompts(lm, seen, batch.response_mask):
        with uncompiled(lm):
            return TokenStates(shared.read(backbone, batch.response_mask), head)
    if is_packed(lm, seen.input_ids.device):
        real = seen.attention_mask.bool()
        positions = torch.arange(real.shape[1], device=real.device)
        row = PackedRow.of(seen.input_ids, real, positions)
        predicting = seen.predicting_positions(batch.response_mask, row.bounds[:-1])
        return TokenStates(row.read(backbone)[predicting], head)
    hidden = backbone(
        input_ids=seen.input_ids, attention_mask=seen.attention_mask, use_cache=False
    ).last_hidden_state
    kept = hidden.flatten(0, 1)[seen.predicting_positions(batch.response_mask)]
    return TokenStates(kept, head)
