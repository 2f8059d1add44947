"""The Hugging Face engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import HFEngine, Sampling
from tests.engine_contract import (
    MAX_LENGTH,
    REQUESTS,
    EngineContract,
    assert_scored_by,
    reference_model,
)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Any) -> Iterator[HFEngine]:
    engine = HFEngine(device="cpu")
    assert engine.version == -1
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    assert engine.version == -1
    yield engine
    engine.close()


class TestHFEngine(EngineContract):
    """The contract, on transformers' generate."""


def test_splitting_a_long_list_changes_nothing(engine: HFEngine, tiny_model_dir: Any) -> None:
    split = HFEngine(device="cpu", max_batch_size=4)
    split.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    engine.load_weights(0, reference_model(tiny_model_dir()).named_parameters())
    sampling = Sampling(max_new_tokens=16)
    together = [c.response_ids for c in engine.generate(REQUESTS, sampling)]
    assert [c.response_ids for c in split.generate(REQUESTS, sampling)] == together


def test_the_folders_generation_config_cannot_change_sampling(
    tiny_model_dir: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    settings = {"eos_token_id": [1, 9], "repetition_penalty": 3.0, "top_k": 2, "min_p": 0.3}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    engine = HFEngine(device="cpu")
    engine.start(ModelSource(str(folder)), max_length=MAX_LENGTH)
    sampling = Sampling(max_new_tokens=24)
    completions = engine.generate(REQUESTS, sampling)
    assert_scored_by(reference_model(folder), REQUESTS, completions, sampling)
    # Its stop tokens do count: they are part of how the model ends a turn.
    assert any(c.response_ids[-1] == 9 for c in completions)
    assert all(9 not in c.response_ids[:-1] for c in completions)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_come_once(tiny_model_dir: Any, tie: bool) -> None:
    other = reference_model(tiny_model_dir(seed=1, tie=tie))
    assert ("lm_head.weight" in dict(other.named_parameters())) is not tie
    engine = HFEngine(device="cpu")
    engine.start(ModelSource(str(tiny_model_dir(tie=tie))), max_length=MAX_LENGTH)
    engine.load_weights(3, other.named_parameters())
    sampling = Sampling(max_new_tokens=16)
    assert_scored_by(other, REQUESTS, engine.generate(REQUESTS, sampling), sampling)


def test_names_and_shapes_that_do_not_fit_are_refused(
    engine: HFEngine, tiny_model_dir: Any
) -> None:
    weights = dict(reference_model(tiny_model_dir()).named_parameters())
    norm = "model.norm.weight"
    cases = {
        "'extra' is not a parameter": [*weights.items(), ("extra", torch.zeros(1))],
        f"1 of {len(weights)} never came, '{norm}'": [
            item for item in weights.items() if item[0] != norm
        ],
        "came twice": [*weights.items(), (norm, weights[norm])],
        r"has shape \[1\], the engine's model expects \[64\]": [(norm, torch.zeros(1))],
    }
    engine.version = 5
    for message, pushed in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            engine.load_weights(6, pushed)
        assert "\n" not in str(caught.value)
        assert engine.version == 5


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.max_batch_size: got 0, expected >= 1"):
        HFEngine(max_batch_size=0)
