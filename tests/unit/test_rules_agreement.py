"""R2-OPD's reweighting and Uni-OPD's margins by hand."""

import math
from statistics import median
from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.rules.agreement import AlignedReweighting, MarginShift
from opd_lightning.rules.base import Rule, Scored
from tests.toy import applied, make_scored, opd_signal


def of_ratio(*rows: list[float], **fields: Any) -> Scored:
    d = torch.tensor(rows, dtype=torch.float64)
    student = torch.full_like(d, -1.0)
    return make_scored(student, student + d, **fields)


def advantages(rule: Rule, scored: Scored) -> list[list[float]]:
    return applied(rule, scored)[0].advantage.tolist()


# AlignedReweighting --------------------------------------------------------------------

ROW = [1.0, -2.0, 0.5, -0.25]


@pytest.mark.parametrize("reward", [1.0, 0.0, 0.75])
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 20.0])
def test_reweighting_by_hand(reward: float, sharpness: float) -> None:
    nu = median(map(abs, ROW))
    gate = [1 / (1 + math.exp(-sharpness * (2 * reward - 1) * a / nu)) for a in ROW]
    scale = sum(map(abs, ROW)) / sum(g * abs(a) for g, a in zip(gate, ROW, strict=True))
    expected = [a * g * scale for g, a in zip(gate, ROW, strict=True)]
    (found,) = advantages(AlignedReweighting(sharpness), of_ratio(ROW, rewards=[reward]))
    assert found == pytest.approx(expected)
    assert sum(map(abs, found)) == pytest.approx(sum(map(abs, ROW)))
    assert [a > 0 for a in found] == [a > 0 for a in ROW]


def test_what_agrees_gets_more() -> None:
    scored = of_ratio(ROW, ROW, rewards=[1.0, 0.0])
    signal, rates = applied(AlignedReweighting(1.0), scored)
    agrees = torch.tensor([[True, False, True, False], [False, True, False, True]])
    assert torch.equal(rates["aligned_reweighting/agreeing"] > 0, agrees)
    assert torch.equal(rates["aligned_reweighting/size"], signal.advantage.abs())
    factor = signal.advantage / scored.log_ratio
    for row in range(2):
        assert factor[row][agrees[row]].min() > factor[row][~agrees[row]].max()


def test_who_is_not_reweighted() -> None:
    rule = AlignedReweighting(5.0)
    scored = of_ratio(
        *[ROW] * 4, rewards=[1.0, 1.0, math.nan, 0.5], truncated=[False, True, False, False]
    )
    found = advantages(rule, scored)
    assert found[0] != pytest.approx(ROW)
    assert found[1:3] == [ROW, ROW]  # truncated, and without a score
    assert found[3] == pytest.approx(ROW)  # a score that is neither
    assert advantages(AlignedReweighting(0.0), scored)[0] == pytest.approx(ROW)
    assert advantages(rule, of_ratio([0.0] * 4, rewards=[1.0])) == [[0.0] * 4]
    # A median of 0: what agrees has all of the weight, and nothing is infinite.
    sparse = of_ratio([0.0, 0.0, 0.0, 3.0, -2.0], rewards=[1.0])
    assert advantages(rule, sparse)[0] == pytest.approx([0.0, 0.0, 0.0, 5.0, 0.0])


def test_only_tokens_that_take_part_are_weighed() -> None:
    scored = of_ratio([*ROW, 90.0], rewards=[1.0])
    signal = opd_signal(scored, torch.tensor([[True] * 4 + [False]]))
    (found,) = applied(AlignedReweighting(1.0), scored, signal)[0].advantage.tolist()
    (alone,) = advantages(AlignedReweighting(1.0), of_ratio(ROW, rewards=[1.0]))
    assert found[:4] == pytest.approx(alone)
    assert found[4] == 0.0


# MarginShift ---------------------------------------------------------------------------

# Means: prompt 0 correct -1, 1, wrong 0.5, 1.5; prompt 1 correct 5, wrong 0; prompt 2 correct.
ROWS = [[-1.0, -1.0], [2.0, 0.0], [0.5, 0.5], [1.0, 2.0], [5.0, 5.0], [0.0, 0.0], [3.0, 3.0]]
REWARDS = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
GROUPS = [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("settings", "up", "down"),
    [
        ({}, 0.7, 0.7),  # 0.4 - (0 - 1), halved
        ({"moves": "correct"}, 1.4, 0.0),
        ({"moves": "wrong"}, 0.0, 1.4),
        ({"statistic": "extreme"}, 1.45, 1.45),  # 0.4 - (-1 - 1.5), halved
        ({"margin": 0.0}, 0.5, 0.5),
    ],
)
def test_margins_by_hand(settings: dict[str, Any], up: float, down: float) -> None:
    scored = of_ratio(*ROWS, rewards=REWARDS, groups=GROUPS)
    signal, rates = applied(MarginShift(**settings), scored)
    moved = (signal.advantage - scored.log_ratio)[:, 0].tolist()
    assert moved == pytest.approx([up, up, -down, -down, 0, 0, 0])
    assert rates["margin_shift/shifted"][:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert rates["margin_shift/shift"][:4, 0].tolist() == pytest.approx([up + down] * 4)


def test_after_it_the_margin_holds() -> None:
    rule = MarginShift(0.4)
    after = applied(rule, of_ratio(*ROWS, rewards=REWARDS, groups=GROUPS))[0]
    means = after.advantage.mean(dim=1)
    assert float(means[:2].mean() - means[2:4].mean()) == pytest.approx(0.4)


def test_a_mean_is_over_what_takes_part() -> None:
    scored = of_ratio([1.0, 9.0], [2.0, 2.0], rewards=[1.0, 0.0])
    signal = opd_signal(scored, torch.tensor([[True, False], [True, True]]))
    found = applied(MarginShift(0.5), scored, signal)[0].advantage
    assert found.tolist() == [[1.75, 0.0], [1.25, 1.25]]  # 0.5 - (1 - 2), halved


def test_partial_scores_have_a_threshold() -> None:
    scored = of_ratio([1.0], [2.0], rewards=[0.5, 0.4])
    assert advantages(MarginShift(0.0), scored) == [[1.5], [1.5]]
    assert advantages(MarginShift(0.0, threshold=0.6), scored) == [[1.0], [2.0]]


def test_a_rollout_without_a_score_neither_counts_nor_moves() -> None:
    more = of_ratio(*ROWS, [-99.0, 0.0], rewards=[*REWARDS, math.nan], groups=[*GROUPS, 0])
    less = of_ratio(*ROWS, rewards=REWARDS, groups=GROUPS)
    rule = MarginShift()
    assert advantages(rule, more) == [*advantages(rule, less), [-99.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (AlignedReweighting, {"sharpness": -1.0}),
        (AlignedReweighting, {"sharpness": math.inf}),
        (MarginShift, {"margin": -0.1}),
        (MarginShift, {"threshold": 0.0}),
    ],
)
def test_fields_are_checked(kind: type[Rule], field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        kind(**field)
