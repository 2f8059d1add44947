"""Exports and pushes contain the whole model, for many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_lightning.commands.export import write_hf_folder
from opd_lightning.data.engines import push
from opd_lightning.models.causal_lm import load_causal_lm
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine
from tests.families import family_params, randomize, write_family


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    """[1, T, V] of a fixed sequence, by transformers' own forward pass."""
    ids = torch.tensor([[3 + 7 * t % 60 for t in range(24)]])
    return model(ids, use_cache=False).logits.float().log_softmax(-1)


@pytest.mark.parametrize("family", family_params())
def test_exports_and_pushes_hold_all_that_a_folder_holds(family: str, tmp_path: Path) -> None:
    start = write_family(tmp_path / "start", family)
    student = Student(str(start))
    student.load()
    before = logprobs(student.model.eval())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        randomize(student.model)
    expected = logprobs(student.model)
    assert (expected - before).abs().max() > 0.01

    write_hf_folder(student, tmp_path / "out")
    source = ModelSource(str(tmp_path / "out"))
    again = load_causal_lm(source, dtype="float32")
    torch.testing.assert_close(logprobs(again), expected)

    engine = HFEngine(device="cpu")
    engine.start(student.source, max_length=32)
    assert push(student, engine, version=1) == 1
    torch.testing.assert_close(logprobs(engine._model), expected)

    # What engines of vLLM are sent is what the folder holds.
    stored = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    layout = FolderFormat.of(student.source, torch.float32)
    sent = dict(layout.convert(student.weights()))
    assert list(sent) == list(layout.tensors)
    assert sent.keys() == stored.keys()
    for name, tensor in sent.items():
        assert torch.equal(tensor, stored[name]), name
        assert layout.tensors[name].shape == tensor.shape
        assert layout.tensors[name].dtype == tensor.dtype
