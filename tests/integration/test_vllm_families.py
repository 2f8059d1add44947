"""vLLM writes what transformers computes, before and after a push, for many architectures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.models.weights import full_weights
from opd_lightning.rollouts import Sampling, VLLMEngine
from tests.engine_contract import REQUESTS, assert_scored_by
from tests.families import LENGTH, family_model, write_family

pytestmark = pytest.mark.vllm
SAMPLING = Sampling(max_new_tokens=8)
# Those of the table in docs/using.md that work.
QUICK = ("qwen3_moe",)
SLOW = (
    "gpt2",
    *("llama", "mistral", "phi3", "gemma3_text", "gemma4_text"),
    *("mixtral", "qwen2_moe", "olmoe", "glm4_moe", "granitemoe", "llama4_text"),
)


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]
)
def test_log_probs_are_exact_before_and_after_a_push(family: str, tmp_path: Path) -> None:
    first, second = (family_model(family, seed=seed) for seed in (0, 1))
    engine = VLLMEngine()
    engine.start(ModelSource(str(write_family(tmp_path, family))), max_length=LENGTH)
    try:
        assert_scored_by(first, REQUESTS, engine.generate(REQUESTS, SAMPLING), SAMPLING)
        for version, model in enumerate((second, first)):
            pushed = PushedWeights(partial(full_weights, model), engine.weights_dtype)
            engine.load_weights(version, pushed)
            assert pushed.check(version, engine.weight_sums()) == 1
            assert_scored_by(model, REQUESTS, engine.generate(REQUESTS, SAMPLING), SAMPLING)
    finally:
        engine.close()
