"""Mapping of a folder's tensors to parameters of vLLM's models, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opd_lightning.models.weight_sums import WeightSum
from opd_lightning.serving.vllm_sums import sums_in_vllm


class Mapper:
    def map_name(self, name: str) -> str | None:
        if name.startswith("vision."):
            return None
        return name.replace("transformer.", "model.").replace("A_log", "A")


class Packed(nn.Module):
    """A linear layer of the CPU build: its weight is elsewhere."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))
        self.input_size = weight.shape[1]
        self.cpu_linear = lambda x, _, bias: nn.functional.linear(x, weight, bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(4, 12, bias=False)
        self.gate = Packed(torch.arange(8.0).view(2, 4))
        self.experts = nn.Module()
        self.experts.routed = nn.Module()
        self.experts.routed.w13_weight = nn.Parameter(torch.randn(2, 6, 4))
        self.experts.routed.w2_weight = nn.Parameter(torch.randn(2, 4, 3))
        self.A = nn.Parameter(torch.randn(4))
        self.register_buffer("bias", torch.ones(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)


class Model(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012
    hf_to_vllm_mapper = Mapper()

    def __init__(self) -> None:
        super().__init__()
        self.model = Block()


def test_names_of_the_folder_are_found() -> None:
    experts = [
        f"transformer.experts.{i}.{name}_proj.weight"
        for i in range(2)
        for name in ("gate", "up", "down")
    ]
    own = [f"transformer.{name}_proj.weight" for name in "qkv"]
    others = ["transformer.gate.weight", "transformer.bias", "transformer.A_log", "vision.weight"]
    model: Any = Model()
    found = {one.names: one.value for one in sums_in_vllm(model, [*own, *experts, *others])}
    assert set(found) == {
        tuple(own),
        tuple(name for name in experts if "down" not in name),
        tuple(name for name in experts if "down" in name),
        ("transformer.gate.weight",),
        ("transformer.bias",),
    }
    assert found[("transformer.gate.weight",)] == WeightSum.of(torch.arange(8.0))


@pytest.mark.parametrize(
    "names",
    [
        ["transformer.experts.gate_up_proj", "transformer.experts.down_proj"],
        ["transformer.input_linear.weight", "transformer.output_linear.weight"],
    ],
)
def test_experts_that_the_folder_has_fused_are_found(names: list[str]) -> None:
    model: Any = Model()
    assert {one.names for one in sums_in_vllm(model, names)} == {(name,) for name in names}
