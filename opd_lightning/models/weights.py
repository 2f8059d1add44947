"""A student's full weights under their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.folder_format import stored_tensors
from opd_lightning.models.sharding import full_tensor

PLAIN_VARIANTS = ("MiCALinearVariant",)  # classes of peft; only their training differs from LoRA's
TOKEN_ROWS = "trainable_tokens_delta"  # peft's name of the rows of `trainable_token_indices`


def full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full detached tensor), one at a time; see `stored_tensors`.

    LoRA is merged on the fly, weight by weight. Shards are gathered, so all ranks must iterate
    together; no sharded model has LoRA on fused experts. At most one full tensor exists beside the
    model, two while LoRA is merged, provided the caller releases each before the next. Modules that
    peft trains fully (`modules_to_save`) have their names in the model without peft.
    """
    if not hasattr(model, "peft_config"):
        for name, tensor in stored_tensors(model):
            yield name, full_tensor(tensor.detach())
        return

    modules = dict(model.named_modules())
    (adapter,) = model.active_adapters
    experts = {id(w.get_param()): w for w in modules.values() if _is_of_experts(w)}
    for name, tensor in stored_tensors(model):
        plain = _without_peft(name, adapter)
        if plain is None:
            continue
        owner, found, _ = name.partition(".base_layer.weight")
        if found and adapter in getattr(modules[owner], "lora_A", {}):
            weight = _delta(modules[owner], adapter).to(tensor.dtype)
            weight += full_tensor(tensor.detach())
        elif id(tensor) in experts:
            with torch.no_grad():
                weight = experts[id(tensor)].get_delta_weight(adapter).add_(tensor)
        elif found and adapter in getattr(modules[owner], TOKEN_ROWS, {}):
            weight = _with_rows(full_tensor(tensor.detach()), modules[owner], adapter)
        else:
            weight = full_tensor(tensor.detach())
        yield plain, weight
        del weight  # before the next is gathered


def _without_peft(name: str, adapter: str) -> str | None:
    """Return a tensor's name in the model without peft; None for the adapter's own tensors."""
    if ".lora_" in name or ".original_module." in name or TOKEN_ROWS in name:
        return None
    plain = name.removeprefix("base_model.model.").replace(f".modules_to_save.{adapter}.", ".")
    # Wrappers of several parameters of a module are inside of one another.
    return re.sub(r"(\.token_adapter)?(\.base_layer)+\.", ".", plain)


@torch.no_grad()
def _with_rows(weight: Tensor, layer: Any, adapter: str) -> Tensor:
    """Return a copy of an embedding's weight with the rows that peft trains."""
    index = torch.tensor(layer.token_indices[adapter], device=weight.device)
    rows = full_tensor(layer.trainable_tokens_delta[adapter].detach())
    return weight.index_copy(0, index, rows.to(weight))


@torch.no_grad()
def _delta(layer: Any, adapter: str) -> Tensor:
    """Return the update of a linear layer's weight by plain LoRA, in float32."""
    down, up = (full_tensor(part[adapter].weight).float() for part in (layer.lora_A, layer.lora_B))
    delta = (up @ down).mul_(layer.scaling[adapter])
    return delta.T.contiguous() if layer.fan_in_fan_out else delta


def check_mergeable(model: Any) -> None:
    """Raise UserError for adapters that `full_weights` would not merge exactly."""
    lm = model.get_base_model()
    shared = {"head": lm.get_output_embeddings(), "embedding": lm.get_input_embeddings()}
    for name, module in shared.items() if model.config.tie_word_embeddings else ():
        if hasattr(module, "modules_to_save"):
            raise UserError(
                f"student.lora.modules_to_save: got the {name}, but head and embedding share one "
                "weight in this model, so training a copy would untie them; leave it out"
            )
    for name, module in model.named_modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if (kind := type(variant).__name__) not in PLAIN_VARIANTS:
                raise UserError(
                    f"student.lora: cannot merge {kind} of {name!r} into the weights an engine "
                    "needs; use plain LoRA (no DoRA, no alora_invocation_tokens)"
                )
    parameters = dict(model.named_parameters())
    (adapter,) = model.active_adapters
    for name in parameters:
        if ".lora_" not in name:
            continue
        owner, _, kind = name.partition(".lora_")
        layer = model.get_submodule(owner)
        if _is_of_experts(layer):
            continue
        is_plain = kind in (f"A.{adapter}.weight", f"B.{adapter}.weight")
        is_plain &= getattr(layer, "parameter_name", "weight") == "weight"
        # A tied weight is listed under its first name only, so its LoRA could not be merged.
        if not is_plain or f"{owner}.base_layer.weight" not in parameters:
            raise UserError(
                f"student.lora: cannot merge {name!r} into the weights an engine needs; use plain "
                "LoRA on linear layers or fused experts (target_parameters), without DoRA and "
                "lora_bias, and not on embeddings or a tied head"
            )


def _is_of_experts(module: Any) -> bool:
    """Return whether peft adapts a module's parameter `[experts, in, out]` or `[experts, out, in]`.

    Another module's weight, if it is a target parameter, is adapted as by plain LoRA.
    """
    return isinstance(module, ParamWrapper) and module.get_param().ndim == 3
