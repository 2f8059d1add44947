"""Prompts that rows share are read once, and the states are those of the rows alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.models import shared_prompts as sharing
from opd_lightning.models.causal_lm import response_states
from opd_lightning.models.readout import measure
from opd_lightning.models.sharding import Sharding
from opd_lightning.models.shared_prompts import SharedPrompts, check_sharing, shared_prompts
from opd_lightning.models.student import Student
from opd_lightning.models.varlen import VARLEN
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from tests.batches import make_batch, make_rollout
from tests.families import family_model, family_params, write_family

DRAW = random.Random(0)


def words(number: int) -> list[int]:
    return [DRAW.randrange(3, 60) for _ in range(number)]


# Longer than the windows of attention, which have 8 tokens; a response of one token is not read.
PROMPTS = [words(12), words(7)]
RESPONSES = [(0, words(10)), (0, words(4)), (1, words(11)), (0, words(1)), (1, words(2))]
BATCH = make_batch(
    [make_rollout(response, prompt_ids=PROMPTS[i], dropped=i == 4) for i, response in RESPONSES]
)
ROUNDING = 5e-6  # of the largest value
KERNELS = (None, "eager", VARLEN)
STATEFUL = ("falcon_h1", "lfm2", "mamba", "qwen3_next", "recurrent_gemma")
# Layers with other states; chunks of attention; code that hands no bounds to its kernel.
NOT_SHARED: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys((*STATEFUL, "llama4_text"), KERNELS),
    **dict.fromkeys(("nemotron", "stablelm"), (VARLEN,)),
}


def loaded(name: str, attention: str | None) -> Any:
    model = family_model(name)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.opd_readout = measure(model)
    model.opd_packing = "on" if attention == VARLEN else "off"
    check_sharing(model, attention=attention)
    return model


@pytest.mark.parametrize("name", family_params())
@torch.no_grad()
def test_states_are_those_of_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a mask, with the default kernel and plainly, and by bounds, like flash attention."""
    monkeypatch.setattr(sharing, "MIN_SAVED", 1)
    monkeypatch.setattr(sharing, "MIN_SHARE", 0.0)
    for attention in KERNELS:
        lm = loaded(name, attention)
        found = shared_prompts(lm, BATCH.views["student"], BATCH.response_mask)
        assert (found is not None) is (attention not in NOT_SHARED.get(name, ()))
        if found is None:
            continue
        states = response_states(lm, BATCH, "student").hidden
        lm.opd_shares_prompts = False
        if attention == VARLEN:
            lm.set_attn_implementation("eager")
            lm.opd_packing = "off"
        alone = response_states(lm, BATCH, "student").hidden
        scale = float(alone.abs().max())
        torch.testing.assert_close(states, alone, atol=ROUNDING * scale, rtol=0)


def test_a_view_by_hand() -> None:
    view = BATCH.views["student"]
    found = SharedPrompts.of(view, BATCH.response_mask.shape[1])
    assert found.rows.bincount().tolist() in ([3, 2], [2, 3])
    for row, (prompt, response) in enumerate(RESPONSES):
        of_row = found.prompts[found.rows[row], : found.lengths[found.rows[row]]]
        assert of_row.tolist() == PROMPTS[prompt]
        assert found.responses[row][found.real[row]].tolist() == response[:-1]
    assert found.positions(packed=False) == 2 * 12 + 5 * 10
    assert found.positions(packed=True) == 12 + 7 + (9 + 3 + 10 + 0 + 1)


def is_shared(lm: Any, prompts: int, length: int, response: int = 8) -> bool:
    """Of 8 rows with so many different prompts."""
    rows = [make_rollout([5] * response, prompt_ids=[7 + i % prompts] * length) for i in range(8)]
    batch = make_batch(rows)
    return shared_prompts(lm, batch.views["student"], batch.response_mask) is not None


def test_sharing_has_to_pay() -> None:
    lm = loaded("qwen3", None)
    with torch.no_grad():
        assert is_shared(lm, prompts=1, length=160)
        assert not is_shared(lm, prompts=1, length=100)  # saves fewer than 1,024 positions
        assert not is_shared(lm, prompts=8, length=160)
        assert not is_shared(lm, prompts=1, length=160, response=600)  # and less than a quarter
        lm.opd_packing = "on"
        assert is_shared(lm, prompts=2, length=200)
    assert not is_shared(lm, prompts=1, length=160)  # which needs a gradient


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_places_that_depend_on_the_longest_row_are_not_shared(kind: str) -> None:
    factors: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        factors |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    factors["original_max_position_embeddings"] = 32
    lm = family_model("llama", rope_parameters=factors)
    lm.opd_readout = measure(lm)
    check_sharing(lm, attention=None)
    assert lm.opd_shares_prompts is (kind == "yarn")


def test_teachers_and_students_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student without a gradient only, and not while it recomputes activations."""
    path = str(write_family(tmp_path, "llama"))
    student, recomputing = Student(path), Student(path, gradient_checkpointing=True)
    teachers = [FrozenTeacher(path), EMATeacher()]
    for model in (student, recomputing):
        model.load()
    for teacher in teachers:
        teacher.load(torch.device("cpu"), student)
    monkeypatch.setattr(sharing, "MIN_SAVED", 1)
    calls: list[int] = []
    real = SharedPrompts.read

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(SharedPrompts, "read", counted)
    for teacher in teachers:
        teacher.score(BATCH, "student")
    assert len(calls) == 2
    student.score(BATCH)
    assert len(calls) == 2
    with torch.no_grad():
        student.score(BATCH)
        assert len(calls) == 3
        recomputing.score(BATCH)
    assert len(calls) == 3


def test_sharded_models_read_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks would gather layers a different number of times."""
    lm: Any = loaded("qwen3", None)
    assert lm.opd_shares_prompts
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: None)
    monkeypatch.setattr(Sharding, "_fully_shard", lambda *_: None)
    nowhere: Any = None
    Sharding(mesh=nowhere, device=torch.device("cpu")).shard(lm)
    assert not lm.opd_shares_prompts
