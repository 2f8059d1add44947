"""peft's LoRA: supported settings, and the relation of the base to the initial model."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from opd_lightning.errors import UserError, reason_of
from opd_lightning.models.weights import check_mergeable

# Initialisations with a zero update of the weights.
_ZERO = (True, "gaussian", "orthogonal", "mica")
# These move a part of the base's weights to the adapter; a disabled adapter removes it.
_SPLIT = ("pissa", "olora")
_NEED_DATA = ("corda", "eva", "lora_ga")


def check_lora(lora: LoraConfig) -> None:
    """Raise UserError for settings that are not supported with any model."""
    if lora.lora_dropout:
        raise UserError(
            f"student.lora.lora_dropout: got {lora.lora_dropout}, expected 0, because the "
            "engine samples without dropout and the trainer must score the same policy"
        )
    for name, rank in {"r": lora.r, **(lora.rank_pattern or {})}.items():
        if rank < 1:
            field = "r" if name == "r" else f"rank_pattern[{name!r}]"
            raise UserError(f"student.lora.{field}: got {rank}, expected at least 1")
    kind = _initialisation(lora)
    if kind in _NEED_DATA:
        raise UserError(
            f"student.lora.init_lora_weights: got {lora.init_lora_weights!r}, which needs a pass "
            "over data that peft's own scripts make; use true, gaussian, orthogonal, olora or pissa"
        )
    if kind not in (*_ZERO, *_SPLIT, False, "loftq"):
        raise UserError(
            f"student.lora.init_lora_weights: got {lora.init_lora_weights!r}, expected true, "
            "false, gaussian, orthogonal, mica, olora, pissa, pissa_niter_<number> or loftq"
        )


def with_lora(model: Any, lora: LoraConfig, *, empty: bool) -> Any:
    """Return `model` with an adapter; an `empty` one is on the meta device.

    Raises:
        UserError: Targets are missing, or the adapter could not be merged.
    """
    if empty:  # on the meta device, weights cannot be decomposed
        lora = copy(lora)
        lora.init_lora_weights = True
    names = [name for name, _ in model.named_modules()]
    for name in lora.modules_to_save or ():
        if not any(f".{known}".endswith(f".{name}") for known in names):
            raise UserError(
                f"student.lora.modules_to_save: got {name!r}, which {type(model).__name__} does "
                "not have; leave it out"
            )
    try:
        adapted = get_peft_model(model, lora)
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"student.lora: peft cannot adapt {type(model).__name__}: {reason_of(error)}"
        ) from error
    _check_layers(adapted)
    check_mergeable(adapted)
    return adapted


def _check_layers(adapted: Any) -> None:
    """Raise UserError for adapters of layers that do more than a linear map, such as routers."""
    for name, module in adapted.named_modules():
        base = module.base_layer if type(module) is Linear else None
        if isinstance(base, nn.Linear) and not _is_product(base):
            raise UserError(
                f"student.lora.target_modules: got {name.removeprefix('base_model.model.')!r}, a "
                f"{type(base).__name__} that computes more than a product; name it in "
                "exclude_modules"
            )


@torch.no_grad()
def _is_product(layer: nn.Linear) -> bool:
    """Return whether a layer computes the same as `nn.Linear`."""
    if type(layer).forward is nn.Linear.forward:
        return True
    weight = layer.weight
    states = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    found = layer(states)
    if not isinstance(found, torch.Tensor):
        return False
    return weight.is_meta or torch.allclose(found, nn.Linear.forward(layer, states), rtol=1e-2)


def moves_base(lora: LoraConfig) -> str | None:
    """Return the setting that makes the base differ from the initial model; None without one."""
    if lora.bias != "none":
        return f"bias: {lora.bias}"
    kind = _initialisation(lora)
    return None if kind in _ZERO else f"init_lora_weights: {str(lora.init_lora_weights).lower()}"


def starts_elsewhere(lora: LoraConfig) -> bool:
    """Return whether the initial model, adapter included, differs from that of the folder."""
    return _initialisation(lora) in (False, "loftq")


def _initialisation(lora: LoraConfig) -> bool | str:
    value = lora.init_lora_weights
    if isinstance(value, bool):
        return value
    name = value.lower()
    return "pissa" if name.startswith("pissa_niter_") else name
