"""Several views of one teacher: the gradient by enumeration, and the settings."""

from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Linear
from opd_lightning.methods import LensOPD
from opd_lightning.models.student import Student
from opd_lightning.teachers import FrozenTeacher
from tests.toy import (
    expected_gradient,
    finite_difference,
    local_reverse_kl,
    make_scored,
    policy_gradient,
    random_logits,
    token_logprobs,
    visit_probabilities,
)


def method(lenses: dict[str, Any]) -> LensOPD:
    made = LensOPD(Student("student"), FrozenTeacher("start"), lenses)
    made.check()
    return made


def test_the_gradient_is_that_of_the_weighted_divergences() -> None:
    at, argument, brevity = (random_logits(seed) for seed in range(3))
    lenses = method({"argument": 1.0, "brevity": 0.25})
    assert {name: ask.view for name, ask in lenses.asks().items()} == {
        "teacher": "argument",
        "lens_brevity": "brevity",
    }
    assert len(lenses.teachers()) == 1

    def losses(ours: torch.Tensor) -> torch.Tensor:
        scored = make_scored(
            ours.detach(), token_logprobs(argument), lens_brevity=token_logprobs(brevity)
        )
        return policy_gradient(ours, lenses.advantage(scored))

    visits = visit_probabilities(at)
    expected = finite_difference(
        lambda x: local_reverse_kl(x, argument, visits) + local_reverse_kl(x, brevity, visits) / 4,
        at,
    )
    torch.testing.assert_close(expected_gradient(at, losses), expected, atol=1e-6, rtol=0)


def test_a_weight_may_be_a_schedule() -> None:
    student, teacher = torch.zeros(1, 2), torch.ones(1, 2)
    lenses = method({"first": Linear(start=1.0, end=0.0, steps=4), "second": 2.0})
    scored = make_scored(student, teacher, step=1, lens_second=-teacher)
    assert lenses.advantage(scored).tolist() == [[-1.25] * 2]


@pytest.mark.parametrize("lenses", [{}, {"view": -1.0}, {"view": float("nan")}])
def test_settings_are_checked(lenses: dict[str, float]) -> None:
    with pytest.raises(UserError, match="lenses"):
        method(lenses)
