"""Training runs whose rollouts vLLM writes, in the trainer's process."""

from __future__ import annotations

import pytest

from opd_lightning.methods import OPD, DivergenceOPD
from opd_lightning.rollouts import VLLMEngine
from tests.integration import test_fit

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_lab")]


@pytest.mark.parametrize("kind", [OPD, pytest.param(DivergenceOPD, marks=pytest.mark.slow)])
def test_engine_and_trainer_agree_at_every_step(kind: type[OPD | DivergenceOPD]) -> None:
    test_fit.test_engine_and_trainer_agree_at_every_step(kind, VLLMEngine)


@pytest.mark.slow
def test_rollouts_written_ahead_are_trained_on_and_corrected() -> None:
    test_fit.test_rollouts_written_ahead_are_trained_on_and_corrected(VLLMEngine)
