"""Schedules at the steps that matter (U8), and as a configuration writes them."""

from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import (
    Constant,
    Linear,
    Schedule,
    Staircase,
    ThreePhaseCosine,
    value_at,
)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.2), (30, 0.2), (32, 0.125), (34, 0.05), (35, 0.0), (100, 0.0)]
)
def test_u8_three_phases(step: int, expected: float) -> None:
    alpha = ThreePhaseCosine(phase1_end=30, phase2_end=34, start=0.2, end=0.05)
    assert alpha(step) == pytest.approx(expected, abs=1e-12)


def test_the_second_phase_is_a_cosine_and_not_a_line() -> None:
    alpha = ThreePhaseCosine(phase1_end=0, phase2_end=4, start=1.0, end=0.0)
    assert alpha(1) == pytest.approx((1 + 0.5**0.5) / 2)


def test_three_phases_without_a_second() -> None:
    alpha = ThreePhaseCosine(phase1_end=3, phase2_end=3, start=0.2, end=0.1)
    assert [alpha(step) for step in (3, 4)] == [0.2, 0.0]


def test_linear_by_hand() -> None:
    line = Linear(start=1.0, end=0.0, steps=4)
    assert [line(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_linear_is_kdrls_annealing() -> None:
    line = Linear(start=5e-3, end=1e-3, steps=80)
    for step in range(120):
        assert line(step) == pytest.approx(max(5e-3 - 5e-5 * step, 1e-3))


def test_staircase_by_hand() -> None:
    stairs = Staircase(maximum=2500, start=1000, increment=1000, every=2)
    assert [stairs(step) for step in range(6)] == [1000, 1000, 2000, 2000, 2500, 2500]


def test_value_at() -> None:
    assert value_at(0.3, 7) == value_at(Constant(0.3), 7) == 0.3
    assert value_at(Linear(start=0.0, end=10.0, steps=10), 7) == 7.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(1.0, 0.0, steps=0), "Linear: steps is 0, expected"),
        (lambda: Staircase(10, every=0), "Staircase: every is 0, expected"),
        (lambda: ThreePhaseCosine(phase1_end=5, phase2_end=4), "phase1_end is 5 and phase2_end 4"),
        (lambda: ThreePhaseCosine(phase1_end=-1, phase2_end=4), "expected 0 <= phase1_end"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


MODULE = "opd_lightning.losses.schedule"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (0.3, 0.3),
        (2, 2.0),
        (
            {"class_path": f"{MODULE}.Linear", "init_args": {"start": 1, "end": 0, "steps": 4}},
            Linear(1.0, 0.0, 4),
        ),
        (
            {
                "class_path": f"{MODULE}.ThreePhaseCosine",
                "init_args": {"phase1_end": 30, "phase2_end": 35},
            },
            ThreePhaseCosine(phase1_end=30, phase2_end=35),
        ),
    ],
)
def test_a_configuration_names_it(written: Any, expected: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=float | Schedule)
    parsed = parser.parse_object({"value": written})
    assert parser.instantiate(parsed).value == expected
