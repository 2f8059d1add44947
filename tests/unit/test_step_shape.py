"""Sizes of a step count the rollouts and the longest responses of every author."""

from types import SimpleNamespace
from typing import Any

import pytest

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.preflight.step_shape import StepShape
from opd_lightning.rollouts import HFEngine, Sampling

OWN, THEIRS, RECORDED = 16, 128, 512


@pytest.mark.parametrize(
    ("mix", "rows", "response"),
    [
        ({}, 8 * 2, OWN),
        ({"teacher": 1.0}, 8 * 4, THEIRS),
        ({"teacher": 0.25}, 4 * 2 + 4 * 4, THEIRS),  # all four on one of the two processes
        ({"recorded": 1.0}, 8, RECORDED),
        ({"add_recorded": True}, 8 * 3, RECORDED),
        ({"teacher": 0.5, "recorded": 0.5}, 8 * 4, RECORDED),
    ],
)
def test_a_step_by_its_authors(mix: dict[str, Any], rows: int, response: int) -> None:
    data: Any = SimpleNamespace(
        mix=RolloutMix(**mix),
        prompts_per_step=16,
        samples_per_prompt=2,
        sampling=Sampling(max_new_tokens=OWN),
        max_tokens_per_micro_batch=None,
        teacher=TeacherSampler(path="x", engine=HFEngine(), samples=4, max_new_tokens=THEIRS),
        module=SimpleNamespace(
            views=lambda: set(), trainer=SimpleNamespace(accumulate_grad_batches=1)
        ),
    )
    shape = StepShape.of(data, 2, 100, RECORDED)
    assert (shape.rows, shape.response) == (rows, response)
    assert StepShape.of(data, 2, 100).response == min(response, THEIRS if "teacher" in mix else OWN)
