"""The decision of `opd check` about a push, from gaps whose closed form is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from opd_lightning.preflight.weight_push import (
    FIRST_NOISE,
    MOVE,
    TOO_FAR,
    TRIES,
    PushGaps,
    Verdict,
    least_noise,
    noise_on,
    report,
)


def after(arrived: float, *, move: float, usual: float, proved: float) -> PushGaps:
    """Gaps of an engine whose log-probs took `arrived` of a move that is alike on all tokens.

    Rounding of either sign, `usual` on every token, adds to the larger part alone.
    """
    to_pushed, to_old = abs(1 - arrived) * move, abs(arrived) * move
    return PushGaps(usual, move, max(to_pushed, usual), max(to_old, usual), proved)


@pytest.mark.parametrize("usual", [3e-7, 0.003, 0.05], ids=["float32", "lab bf16", "135M bf16"])
@pytest.mark.parametrize(
    ("arrived", "proved", "verdict"),
    [
        (1, 1, "arrives"),
        (1, 0.4, "arrives"),
        (1, 0, "not proved"),
        (0, 0, "old"),
        (0.5, 0, "old"),
        (0.7, 0, "in part"),
        (0.7, 0.4, "in part"),
        (-1, 0, "old"),  # other weights
        (4, 0, "old"),
        (0, 1, "not renewed"),
        (0.5, 1, "not renewed"),  # half of the head is a stale copy
        (0.9, 1, "arrives"),  # more rounding than before, but the sums are exact
    ],
)
def test_a_push_that_moves_log_probs_far(
    arrived: float, proved: float, verdict: Verdict, usual: float
) -> None:
    gaps = after(arrived, move=max(0.05, MOVE * usual), usual=usual, proved=proved)
    assert gaps.judge() == verdict
    level = report(gaps, 0.1).level
    expected = {"arrives": "ok", "not proved": "info", "in part": "warning"}
    assert level == expected.get(verdict, "error")


@pytest.mark.parametrize(("proved", "verdict"), [(1, "arrives"), (0.5, "hidden"), (0, "hidden")])
def test_only_sums_show_a_push_that_moves_less_than_rounding(
    proved: float, verdict: Verdict
) -> None:
    """As of LoRA that is scaled to nothing: old and new weights look the same."""
    for arrived in (0, 1):
        gaps = after(arrived, move=0.1, usual=0.05, proved=proved)
        assert gaps.judge() == verdict
    foreign = PushGaps(0.05, 0.1, to_pushed=2.0, to_old=2.0, proved=0)
    assert foreign.judge() == "old"


@pytest.mark.parametrize("proved", [0, 1])
def test_nan_never_arrives(proved: float) -> None:
    assert report(PushGaps(1e-6, 0.1, math.nan, math.nan, proved), 0.1).level == "error"
    assert report(PushGaps(1e-6, math.nan, math.nan, 0.1, proved), 0.1).level == "error"


@pytest.mark.parametrize(
    ("move_by", "most"),
    [
        (lambda noise: 3 * noise, 2),
        (lambda noise: 1e-3 * noise, 5),
        (lambda noise: noise + 20 * noise**2, 5),
        (lambda noise: 1.2 * noise**2, 5),  # LoRA: noise in both matrices
        (lambda noise: 40 * noise**3, 3),
        (lambda noise: 0.1 * noise if noise < 1 else math.nan if noise > 4 else 0.6, 7),
    ],
    ids=["linear", "small", "quadratic", "square", "cubic", "breaks"],
)
def test_the_least_noise(move_by: Callable[[float], float], most: int) -> None:
    tried: list[float] = []

    def count(noise: float) -> float:
        tried.append(noise)
        return move_by(noise)

    noise, move = least_noise(count, 0.5)
    assert 0.5 <= move <= TOO_FAR * 0.5
    assert (noise, move) == (tried[-1], move_by(noise))
    assert len(tried) <= most


def test_a_model_that_moves_far_at_once() -> None:
    assert least_noise(lambda noise: 500 * noise, 0.5) == (FIRST_NOISE, 500 * FIRST_NOISE)


@pytest.mark.parametrize("move", [0.0, 0.49])
def test_no_noise_is_enough(move: float) -> None:
    tried: list[float] = []

    def count(noise: float) -> float:
        tried.append(noise)
        return move

    noise, found = least_noise(count, 0.5)
    assert (noise, found) == (tried[-1], move)
    assert len(tried) == TRIES + 1


def test_noise_is_a_share_of_each_spread_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 100).to(torch.bfloat16)
    nn.init.normal_(model.weight, std=0.02)
    nn.init.zeros_(model.bias)  # as LoRA's B
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    with noise_on(model) as set_noise:
        set_noise(0.5)
        first = model.weight.detach().clone()
        set_noise(5.0)
        large = (model.weight.detach() - before["weight"]).float().std()
        assert float(large) == pytest.approx(5 * 0.02, rel=0.05)
        assert float(model.bias.detach().float().std()) == pytest.approx(5 * 0.1, rel=0.3)
        set_noise(0.5)
        assert torch.equal(model.weight, first)
        assert torch.equal(frozen, before["frozen"])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
