"""Weight sums of vLLM's models, which rename and fuse the tensors of a folder.

Runs in vLLM's worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.models.weight_sums import EngineSum, engine_sums

# "<prefix>.experts.3.down_proj.weight", "<prefix>.experts.gate_up_proj"
STORED_EXPERT = re.compile(r"(.+\.experts)\.(?:\d+\.)?(\w+?)(?:[._](weight|bias))?")
# "<prefix>.experts.w13_weight", "<prefix>.experts.routed_experts.w2_bias"
FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(?:\w+\.)*(w13|w2)_(weight|bias)")
# Renamed by vLLM's loader of the architecture alone (Granite MoE).
RENAMED = (
    (".input_linear.weight", ".experts.gate_up_proj.weight"),
    (".output_linear.weight", ".experts.down_proj.weight"),
    (".router.layer.weight", ".gate.weight"),
)
DOWN = ("down_proj", "w2")  # names of an expert's second matrix; the others are fused into w13


def sums_in_vllm(model: Any, stored: Sequence[str]) -> list[EngineSum]:
    """Return the sums of vLLM's parameters, with the names of the folder's tensors in each.

    Parameters that are not known to hold the unchanged elements of tensors are left out.

    Args:
        model: vLLM's model.
        stored: Names of all tensors in the folder.
    """
    own = (name for name, _ in model.named_parameters())
    experts = {found.groups(): name for name in own if (found := FUSED_EXPERTS.fullmatch(name))}
    parts: dict[str, list[str]] = {}
    for name in stored:
        parts.setdefault(_in_vllm(model, name, experts), []).append(name)
    return engine_sums(_weights(model), parts)


def _in_vllm(model: Any, name: str, experts: dict[tuple[Any, ...], str]) -> str:
    """Return the name of the parameter into which vLLM loads a tensor; any other if unknown."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = name if mapper is None else mapper.map_name(name)
    if mapped is None or _leaf(mapped) != _leaf(name):
        return ""  # ignored, or transformed (Mamba's A_log becomes A)
    for ending, other in RENAMED:
        mapped = f"{mapped.removesuffix(ending)}{other}" if mapped.endswith(ending) else mapped
    if found := STORED_EXPERT.fullmatch(mapped):
        prefix, matrix, kind = found.groups()
        key = (prefix, "w2" if matrix in DOWN else "w13", kind or "weight")
        if key in experts:
            return experts[key]
    for whole, parts in getattr(model, "packed_modules_mapping", {}).items():
        for part in parts:
            before, hit, after = mapped.rpartition(f".{part}.")
            if hit:
                return f"{before}.{whole}.{after}"
    return mapped


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by vLLM's names.

    On the CPU a linear layer keeps only oneDNN's packed copy of its weight. Its product with the
    identity is the weight, exactly.
    """
    persistent = model.state_dict(keep_vars=True)
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if name == "weight" and weight.numel() == 0 and hasattr(module, "cpu_linear"):
                size = getattr(module, "input_size_per_partition", None) or module.input_size
                weight = module.cpu_linear(torch.eye(size, dtype=weight.dtype), weight, None)
            yield f"{prefix}.{name}", weight
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name in persistent:
                yield name, buffer
