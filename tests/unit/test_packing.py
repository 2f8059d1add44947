"""Packed rows equal padded ones: every family, both ways of keeping sequences apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import response_states
from opd_lightning.models.packing import (
    PackedRow,
    check_packing,
    is_packed,
    set_packing,
    why_not,
)
from opd_lightning.models.readout import measure
from opd_lightning.models.student import Student
from opd_lightning.models.varlen import VARLEN
from tests.batches import make_batch, make_rollout
from tests.families import FAMILIES, family_config, family_model, family_params, write_family

RESPONSES = [[8, 30, 11, 52, 1], [25, 6], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
PROMPTS = [[5, 17, 33], [9, 40, 21, 60, 7, 12, 44], [3, 4, 5, 6, 7]]
PRIVILEGED = [[7], None, [9, 41, 5, 5, 8, 30]]
BATCH = make_batch(
    [
        make_rollout(response, prompt_ids=prompt, views={"privileged": seen})
        for response, prompt, seen in zip(RESPONSES, PROMPTS, PRIVILEGED, strict=True)
    ]
)
ROUNDING = 5e-6  # of the largest value
STATEFUL = ("falcon_h1", "lfm2", "mamba", "qwen3_next", "recurrent_gemma")
NOT_PACKED = {
    **dict.fromkeys(STATEFUL, "state|layers of 'conv'"),
    "llama4_text": "layers of 'chunked_attention'",
    **dict.fromkeys(("bloom", "mpt"), "takes no position_ids"),
}
# Found by reading a few sequences only: the mask is made without positions.
MIXED = {"falcon", "gpt_oss", "opt", "xglm"}
# Their code calls attention without what else it was given.
NO_BOUNDS = {"falcon", "gptj", "nemotron", "stablelm", "xglm"}


def loaded(name: str, attention: str | None = None) -> Any:
    model = family_model(name)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.opd_readout = measure(model)
    return model


def states_and_gradients(lm: Any, view: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a sum of the states with random factors."""
    hidden = response_states(lm, BATCH, view).hidden
    lm.zero_grad()
    factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * factors).sum().backward()
    named = lm.named_parameters()
    return hidden.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_equal(packed: tuple[Tensor, dict[str, Tensor]], padded: Any) -> None:
    states, gradients = padded
    scale = float(states.abs().max())
    torch.testing.assert_close(packed[0], states, atol=ROUNDING * scale, rtol=0)
    assert packed[1].keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    torch.testing.assert_close(packed[1], gradients, atol=ROUNDING * largest, rtol=0)


PACKED = sorted(FAMILIES.keys() - NOT_PACKED.keys() - (MIXED & NO_BOUNDS))


@pytest.mark.parametrize("name", family_params(PACKED))
def test_a_packed_row_is_the_padded_rows(name: str) -> None:
    """By a mask, with the model's default kernel, and by bounds, like flash attention."""
    lm = loaded(name)
    own = lm.config._attn_implementation
    kernels = [] if name in MIXED else [(own, own)]
    if name not in NO_BOUNDS:
        kernels.append(("eager", VARLEN))  # SDPA leaves out the softcap of Gemma 2's attention
    for of_padded, of_packed in kernels:
        lm.set_attn_implementation(of_padded)
        set_packing(lm, "off")
        padded = {view: states_and_gradients(lm, view) for view in BATCH.views}
        lm.set_attn_implementation(of_packed)
        set_packing(lm, "on")
        check_packing(lm, attention=of_packed)
        for view, expected in padded.items():
            assert_equal(states_and_gradients(lm, view), expected)


@pytest.mark.parametrize("name", NOT_PACKED)
def test_families_that_mix_packed_sequences_are_named(name: str, tmp_path: Path) -> None:
    lm = loaded(name)
    set_packing(lm, "auto")
    assert not is_packed(lm, torch.device("cuda"))
    path = str(write_family(tmp_path, name))
    with pytest.raises(UserError, match=f"got on, but .*({NOT_PACKED[name]})"):
        Student(path, packing="on").check()


@pytest.mark.parametrize("name", sorted(MIXED))
def test_families_that_mix_packed_sequences_are_found_out(name: str, tmp_path: Path) -> None:
    path = str(write_family(tmp_path, name))
    with pytest.raises(UserError, match="mixes packed sequences"):
        Student(path, packing="on").load()


def test_auto_packs_on_gpus_with_a_kernel_that_takes_bounds() -> None:
    for attention, on_cuda in ((None, False), (VARLEN, True)):
        lm = loaded("qwen3", attention)
        set_packing(lm, "auto")
        assert is_packed(lm, torch.device("cuda")) is on_cuda
        assert not is_packed(lm, torch.device("cpu"))
    set_packing(lm, "off")
    assert not is_packed(lm, torch.device("cuda"))


@pytest.mark.parametrize("name", sorted(NO_BOUNDS))
def test_families_that_hand_on_no_bounds_are_known(name: str) -> None:
    """Known without weights; `auto` pads them."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(family_config(name))
    assert why_not(lm) is None
    lm.config._attn_implementation = VARLEN
    assert "no bounds" in str(why_not(lm))
    set_packing(lm, "auto")
    assert not is_packed(lm, torch.device("cuda"))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text", "gpt2", "gpt_oss"])
def test_bounds_are_found_without_weights(name: str) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(family_config(name))
    lm.set_attn_implementation(VARLEN)
    assert why_not(lm) is None
    assert lm.config._attn_implementation == VARLEN


def test_a_row_by_hand() -> None:
    view = BATCH.views["student"]
    positions = torch.arange(view.input_ids.shape[1])
    row = PackedRow.of(view.input_ids, view.attention_mask.bool(), positions)
    tokens = [t for p, r in zip(PROMPTS, RESPONSES, strict=True) for t in p + r]
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert row.input_ids.tolist() == [tokens]
    assert row.position_ids.tolist() == [[i for n in lengths for i in range(n)]]
    assert row.bounds.tolist() == [0, 8, 17, 32]
    assert row.bounds.dtype == torch.int32
    assert row.longest == 15
    predicting = view.predicting_positions(BATCH.response_mask, row.bounds[:-1]).tolist()
    assert [tokens[i + 1] for i in predicting] == [t for r in RESPONSES for t in r]


class Forgetful(nn.Module):
    """A backbone that leaves positions out, so that a row is one sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, *, position_ids: Any = None, **more: Any) -> Any:
        return self.inner(**more)


def test_a_model_that_mixes_sequences_is_found_out() -> None:
    lm = loaded("llama")
    set_packing(lm, "on")
    lm.model = Forgetful(lm.model)
    with pytest.raises(UserError, match="mixes packed sequences"):
        check_packing(lm, attention="sdpa")
