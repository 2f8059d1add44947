"""Clips, REOPOLD's floor and phases (U16), and vOPD's baseline by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import kl
from opd_lightning.losses.reduction import aggregate
from opd_lightning.rules.base import Rule, Scored
from opd_lightning.rules.regulation import (
    Floor,
    HardClip,
    PhasedFloor,
    SoftLog,
    VocabularyBaseline,
)
from opd_lightning.types import Totals
from tests.toy import (
    VISITED,
    applied,
    expected_rule_gradient,
    make_scored,
    opd_signal,
    random_logits,
    sequence_probs,
    token_logprobs,
)


def of_ratio(*ratio: float, entropy: list[float] | None = None, step: int = 0) -> Scored:
    """One rollout with these d_t."""
    d = torch.tensor([ratio], dtype=torch.float64)
    known = None if entropy is None else torch.tensor([entropy], dtype=torch.float64)
    return make_scored(torch.full_like(d, -1.0), d - 1.0, entropy=known, step=step)


def advantages(rule: Rule, *ratio: float) -> list[float]:
    return applied(rule, of_ratio(*ratio))[0].advantage[0].tolist()


# Clips ---------------------------------------------------------------------------------


def test_hard_clip_by_hand() -> None:
    assert advantages(HardClip(), -9.0, -2.0, 2.0, 9.0) == [-5.0, -2.0, 2.0, 5.0]
    signal, rates = applied(HardClip(low=-1.0, high=3.0), of_ratio(-9.0, -1.0, 2.0, 9.0))
    assert signal.advantage.tolist() == [[-1.0, -1.0, 2.0, 3.0]]
    assert rates["hard_clip/clipped"].tolist() == [[1, 0, 0, 1]]


def test_soft_log_is_odd_monotone_and_has_slope_1_at_0() -> None:
    points = torch.linspace(-9, 9, 181, dtype=torch.float64).tolist()
    soft = torch.tensor(advantages(SoftLog(), *points), dtype=torch.float64)
    torch.testing.assert_close(soft, -soft.flip(0), atol=1e-12, rtol=0)
    assert (soft.diff() > 0).all()
    small = 1e-6
    assert advantages(SoftLog(), small, -small, 0.0) == pytest.approx([small, -small, 0.0], 1e-5)
    assert advantages(SoftLog(), math.e - 1, 1 - math.e) == pytest.approx([1.0, -1.0])


# REOPOLD -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixing", "value"), [(0.1, -2.5584), (0.2, -2.0118), (0.3, -1.7200)])
def test_u16_floor_value(mixing: float, value: float) -> None:
    assert Floor(mixing).value == pytest.approx(value, abs=5e-5)
    assert advantages(Floor(mixing), -50.0, 50.0) == pytest.approx([Floor(mixing).value, 50.0])


@pytest.mark.parametrize("mixing", [0.05, 0.3, 0.9])
def test_u16_the_floor_is_a_lower_bound_of_the_mixture(mixing: float) -> None:
    d = torch.linspace(-30, 30, 601, dtype=torch.float64)
    mixture = ((1 - mixing) * d.exp() + mixing).log() / (1 - mixing)
    floored = torch.tensor(advantages(Floor(mixing), *d.tolist()), dtype=torch.float64)
    assert (mixture >= floored - 1e-12).all()
    assert (mixture - floored).min() < 1e-2  # and a tight one


def test_u16_no_mixing_is_opd() -> None:
    ratio = [-80.0, -1.0, 3.0]
    assert advantages(Floor(0.0), *ratio) == pytest.approx(ratio)
    signal, rates = applied(PhasedFloor(mixing=0.0, switch_step=1), of_ratio(*ratio))
    assert signal.mask.all()
    assert rates["floor/clipped"].sum() == 0


def test_u16_exploration_drops_what_is_clipped() -> None:
    scored = of_ratio(-9.0, -1.0, 3.0, step=4)
    signal, rates = applied(PhasedFloor(mixing=0.3, switch_step=5), scored)
    assert signal.mask.tolist() == [[False, True, True]]
    assert rates["floor/clipped"].tolist() == [[1, 0, 0]]
    assert rates["floor/kept"].tolist() == [[0, 1, 1]]
    # Absent from the numerator and from the normaliser.
    selected = Totals(int(signal.mask.sum()), 1)
    loss = aggregate(-signal.advantage, signal.mask, selected, "mask-mean")
    assert loss.item() == pytest.approx(-(-1.0 + 3.0) / 2)


def test_u16_exploration_keeps_a_token_on_the_floor() -> None:
    scored = of_ratio(0.0, 0.0)
    signal = opd_signal(scored)
    rule = PhasedFloor(mixing=0.3, switch_step=5)
    signal.advantage[0, 0] = rule.value
    after, rates = applied(rule, scored, signal)
    assert after.mask.tolist() == [[True, True]]
    assert rates["floor/clipped"].tolist() == [[0, 0]]


ENTROPY = [0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 1.0]


@pytest.mark.parametrize("top", [0.05, 0.1, 0.2, 0.25, 0.3, 0.55, 0.7, 0.9, 1.0])
def test_u16_refinement_keeps_what_the_quantile_keeps(top: float) -> None:
    entropy = [*ENTROPY, 0.95]
    scored = of_ratio(*[-9.0] * 11, entropy=entropy, step=5)
    signal, rates = applied(PhasedFloor(mixing=0.3, switch_step=5, top=top), scored)
    values = torch.tensor(entropy, dtype=torch.float64)
    expected = values >= torch.quantile(values, 1 - top) - 1e-9
    assert signal.mask[0].tolist() == expected.tolist()
    assert torch.equal(rates["floor/kept"][0], expected.double())
    assert signal.advantage.unique().tolist() == [Floor(0.3).value]  # clipped, yet kept


def test_u16_refinement_by_hand() -> None:
    scored = of_ratio(*[0.0] * 10, entropy=ENTROPY)
    signal, _ = applied(PhasedFloor(switch_step=0), scored)
    assert [e for e, kept in zip(ENTROPY, signal.mask[0], strict=True) if kept] == [0.9, 1.0]
    signal, _ = applied(PhasedFloor(switch_step=0, top=1.0), scored)
    assert signal.mask.all()


def test_u16_the_quantile_is_that_of_the_step() -> None:
    """Two micro-batches, one with high entropies, one with low; and none before the switch."""
    rule = PhasedFloor(switch_step=3, top=0.5)
    high, low = (of_ratio(0.0, 0.0, entropy=e, step=3) for e in ([0.8, 0.9], [0.1, 0.2]))
    seen = torch.cat([rule.observe(opd_signal(one), one) for one in (high, low)])
    masks = [rule.apply(opd_signal(one), one, seen)[0].mask.tolist() for one in (high, low)]
    assert masks == [[[True, True]], [[False, False]]]
    assert [rule.observes(step) for step in (2, 3)] == [False, True]


def test_u16_refinement_of_an_empty_step_keeps_nothing() -> None:
    scored = of_ratio(0.0, entropy=[0.5])
    nothing = opd_signal(scored, torch.zeros(1, 1, dtype=torch.bool))
    signal, rates = applied(PhasedFloor(switch_step=0), scored, nothing)
    assert not signal.mask.any()
    assert rates["floor/kept"].tolist() == [[0]]


# vOPD ----------------------------------------------------------------------------------

STUDENT, TEACHER = random_logits(0), random_logits(1)


def baseline() -> Tensor:
    """KL(student || teacher) of the prefix of every token, [S, T]."""
    return kl(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1))[VISITED]


def test_vopd_leaves_the_expected_gradient() -> None:
    plain = expected_rule_gradient(None, STUDENT, TEACHER)
    values = {VocabularyBaseline.comparison: baseline()}
    with_baseline = expected_rule_gradient(VocabularyBaseline(), STUDENT, TEACHER, values=values)
    torch.testing.assert_close(with_baseline, plain, atol=1e-12, rtol=0)
    assert plain.abs().max() > 0.01


def test_vopd_centres_the_advantage_at_every_prefix() -> None:
    scored = make_scored(
        token_logprobs(STUDENT), token_logprobs(TEACHER), values={"baseline": baseline()}
    )
    signal, rates = applied(VocabularyBaseline(), scored)
    probs = sequence_probs(STUDENT)[:, None]
    for prefix in VISITED.unique():
        here = prefix == VISITED
        assert (probs * signal.advantage)[here].sum().abs() < 1e-12
        assert (probs * scored.log_ratio)[here].sum().abs() > 1e-3
    torch.testing.assert_close(rates["baseline/value"], -baseline())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardClip(low=1.0, high=0.0), "HardClip: low is 1.0, expected at most high"),
        (lambda: Floor(1.0), r"Floor: mixing is 1.0, expected a number in \[0, 1\)"),
        (lambda: PhasedFloor(switch_step=1, mixing=-1.0), "PhasedFloor: mixing is -1.0, expected"),
        (lambda: PhasedFloor(switch_step=1, top=0.0), "PhasedFloor: top is 0.0, expected"),
        (lambda: PhasedFloor(switch_step=-1), "PhasedFloor: switch_step is -1, expected"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
