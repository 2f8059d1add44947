"""A push that does not arrive is noticed, however small the step was."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.errors import EngineMismatchError
from opd_lightning.models import weight_sums
from opd_lightning.models.weight_sums import PushedWeights, engine_sums

NAMES = ("layers.0.q_proj.weight", "layers.0.k_proj.weight", "norm.weight")
PARTS = {"layers.0.qk_proj.weight": NAMES[:2], "norm.weight": NAMES[2:]}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(64, 48, generator=generator) for name in NAMES}


def fused(own: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """As vLLM would hold them: two layers in one, and rows of padding."""
    both = torch.cat([own[NAMES[0]], own[NAMES[1]], torch.zeros(5, 48)])
    return [("layers.0.qk_proj.weight", both), ("norm.weight", own["norm.weight"].flip(0))]


def push(own: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> PushedWeights:
    pushed = PushedWeights(own.items, dtype)
    assert dict(pushed).keys() == own.keys()
    return pushed


def test_fused_and_padded_parameters_agree() -> None:
    found = engine_sums(fused(weights()), PARTS)
    assert push(weights()).check(3, found) == 1.0


def test_parameters_in_another_layout_or_precision_prove_nothing() -> None:
    own = weights()
    empty = [*fused(own)[:1], ("norm.weight", torch.empty(0))]
    assert push(own).check(3, engine_sums(empty, PARTS)) == 2 / 3
    assert push(own).check(3, engine_sums(fused(own))) == 1 / 3
    assert push(own, torch.bfloat16).check(3, engine_sums(fused(own))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_a_small_step_shows(dtype: torch.dtype, size: float) -> None:
    own, old = weights(), weights()
    for name, value in weights(1).items():
        own[name] = own[name] + size * value.sign()
    held = [(name, value.to(dtype)) for name, value in old.items()]
    moved = any((own[n].to(dtype) != old[n].to(dtype)).any() for n in own)
    assert moved  # even in bfloat16, where most elements round back
    with pytest.raises(EngineMismatchError, match=r"step 7: .*'layers.0.q_proj.weight' has norm"):
        push(own, dtype).check(7, engine_sums(held))
    held = [(name, value.to(dtype)) for name, value in own.items()]
    assert push(own, dtype).check(7, engine_sums(held)) == 1.0


def test_large_parameters_are_summed_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = push(weights())
    monkeypatch.setattr(weight_sums, "PART", 1000)
    assert pushed.check(3, engine_sums(weights().items())) == 1.0


def test_nan_is_no_agreement() -> None:
    own = weights()
    held = dict(own, **{"norm.weight": own["norm.weight"] * torch.nan})
    with pytest.raises(EngineMismatchError, match=r"'norm.weight'"):
        push(own).check(1, engine_sums(held.items()))


def test_weights_that_nobody_took_are_noticed() -> None:
    pushed = PushedWeights(weights().items, torch.float32)
    next(iter(pushed))
    with pytest.raises(EngineMismatchError, match="did not take the weights"):
        pushed.check(2, [])
