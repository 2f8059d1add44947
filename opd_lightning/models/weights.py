"""A student's full weights under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.sharding import full_tensor


def full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full detached tensor), one at a time, tied weights once.

    LoRA is merged on the fly, weight by weight. Shards are gathered, so all ranks must iterate
    together. At most one full tensor exists beside the model, two while LoRA is merged, provided
    the caller releases each before the next. Modules that peft trains fully (`modules_to_save`)
    have their names in the model without peft.
    """
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            yield name, full_tensor(parameter.detach())
        return

    modules = dict(model.named_modules())
    (adapter,) = model.active_adapters
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        owner, found, _ = name.partition(".base_layer.weight")
        if found and adapter in getattr(modules[owner], "lora_A", {}):
            weight = _delta(modules[owner], adapter).to(parameter.dtype)
            weight += full_tensor(parameter.detach())
        else:
            weight = full_tensor(parameter.detach())
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield plain.replace(f".modules_to_save.{adapter}.", "."), weight
        del weight  # before the next is gathered


@torch.no_grad()
def _delta(layer: Any, adapter: str) -> Tensor:
    """Return the update of a linear layer's weight by plain LoRA, in float32."""
    down, up = (full_tensor(part[adapter].weight).float() for part in (layer.lora_A, layer.lora_B))
    delta = (up @ down).mul_(layer.scaling[adapter])
    return delta.T.contiguous() if layer.fan_in_fan_out else delta


def check_mergeable(model: Any) -> None:
    """Refuse LoRA variants that `full_weights` would not merge exactly."""
    head = model.get_base_model().get_output_embeddings()
    if model.config.tie_word_embeddings and hasattr(head, "modules_to_save"):
        raise UserError(
            "student.lora.modules_to_save: got the head, which this model shares with its "
            "embedding, so training a copy would untie them; leave it out"
        )
    parameters = dict(model.named_parameters())
    (adapter,) = model.active_adapters
    for name in parameters:
        if ".lora_" not in name:
            continue
        owner, _, kind = name.partition(".lora_")
        plain = kind in (f"A.{adapter}.weight", f"B.{adapter}.weight")
        # A tied weight is listed under its first name only, so its LoRA could not be merged.
        if not plain or f"{owner}.base_layer.weight" not in parameters:
            raise UserError(
                f"student.lora: cannot merge {name!r} into the weights an engine needs; use plain "
                "LoRA on linear layers (no DoRA, no lora_bias, not on embeddings or a tied head)"
            )
