"""Tensors under the names of a folder, and what an engine's sums of them prove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Chunk, WeightConverter

from opd_lightning.errors import UserError
from opd_lightning.models.folder_format import FolderFormat, stored_tensors
from opd_lightning.models.weight_sums import EngineSum, WeightSum, engine_sums
from tests.families import family_model

MLP = "model.layers.{}.mlp."


@pytest.fixture
def fused() -> Any:
    """A model whose folder holds two of its matrices as one."""
    model = family_model("qwen3")
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.gate_up_proj.weight", parts, [Chunk(dim=0)])]
    return model


def test_tensors_that_are_stored_as_one_wait_for_each_other(fused: Any) -> None:
    layout = FolderFormat(fused, torch.bfloat16)
    own = dict(fused.named_parameters())
    sent = dict(layout.convert(own.items()))
    assert list(sent) == list(layout.tensors)
    assert {tensor.dtype for tensor in layout.tensors.values()} == {torch.bfloat16}
    for layer in range(2):
        prefix = MLP.format(layer)
        parts = [own[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(sent[f"{prefix}gate_up_proj.weight"], torch.cat(parts))
        assert f"{prefix}up_proj.weight" not in sent
    # A sum over the one is a sum over the others.
    (sums,) = layout.in_model(engine_sums([(f"{MLP.format(1)}gate_up_proj.weight", parts[0])]))
    assert sums.names == tuple(f"{MLP.format(1)}{name}_proj.weight" for name in ("gate", "up"))


def test_a_sum_over_some_of_the_experts_proves_nothing() -> None:
    layout = FolderFormat(family_model("mixtral"), torch.float32)
    start = "model.layers.0.block_sparse_moe.experts"
    down = [name for name in layout.tensors if name.startswith(start) and ".w2." in name]
    assert len(down) == 4, "as a folder of Mixtral has them"
    zero = WeightSum(0.0, 0.0, 1)
    assert layout.in_model([EngineSum(tuple(down[:3]), "torch.float32", zero)]) == []
    (found,) = layout.in_model([EngineSum(tuple(down), "torch.float32", zero)])
    assert found.names == ("model.layers.0.mlp.experts.down_proj",)
    assert layout.in_model([EngineSum(("unknown",), "torch.float32", zero)]) == []


def test_buffers_keep_their_precision() -> None:
    layout = FolderFormat(family_model("glm4_moe"), torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in layout.tensors.items()}
    (bias,) = [name for name in kinds if "e_score_correction_bias" in name]
    assert kinds.pop(bias) == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


class Stateful(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


def test_a_state_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UserError, match="'_extra_state' in its state is no tensor"):
        list(stored_tensors(Stateful()))
