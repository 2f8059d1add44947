"""The vLLM engine, on whatever build of vLLM is installed."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import Engine, HFEngine, Request, Sampling, VLLMEngine
from opd_lightning.serving.vllm_process import vllm_unavailable
from tests.engine_contract import (
    MAX_LENGTH,
    NUCLEUS,
    REQUESTS,
    WHOLE,
    EngineContract,
    assert_scored_by,
    one_setting_each,
    reference_model,
    samplings,
)
from tests.integration.test_server_engine import engine_of as server_engine
from tests.servers import RunningServer

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Any) -> Iterator[VLLMEngine]:
    engine = VLLMEngine()
    assert engine.version == -1
    state, frozen = torch.get_rng_state(), gc.get_freeze_count()
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    assert torch.equal(torch.get_rng_state(), state), "start moved the global random state"
    assert engine.version == -1
    yield engine
    engine.close()
    assert not dist.is_initialized(), "close left a default process group behind"
    # Some of what was frozen may have been freed since, with other tests' engines.
    is_frozen = gc.get_freeze_count() > frozen / 2 > 0
    assert is_frozen, "later collections would pass over all libraries"


class TestVLLMEngine(EngineContract):
    """The contract, on vLLM."""

    @pytest.mark.slow
    @one_setting_each
    def test_logprobs_for_each_setting(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        super().test_logprobs_for_each_setting(engine, model, sampling)

    @samplings(pytest.param(WHOLE, marks=pytest.mark.slow), NUCLEUS)
    def test_frequencies_match_the_distribution(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        super().test_frequencies_match_the_distribution(engine, model, sampling)


def test_greedy_agrees_with_the_reference_engine(engine: VLLMEngine, tiny_model_dir: Any) -> None:
    engine.load_weights(0, reference_model(tiny_model_dir()).named_parameters())
    reference = HFEngine(device="cpu")
    reference.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    sampling = Sampling(temperature=0.0, max_new_tokens=24)
    expected = [c.response_ids for c in reference.generate(REQUESTS, sampling)]
    assert [c.response_ids for c in engine.generate(REQUESTS, sampling)] == expected


def test_a_server_writes_the_same_with_the_same_seeds(
    engine: VLLMEngine, rollout_server: RunningServer, tiny_model_dir: Any, tmp_path: Path
) -> None:
    other = reference_model(tiny_model_dir(seed=1))
    there = server_engine(rollout_server, tmp_path)
    there.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    for one in (engine, there):
        one.load_weights(3, other.named_parameters())
    for sampling in (Sampling(max_new_tokens=24), Sampling(temperature=0.7, max_new_tokens=24)):
        expected, found = engine.generate(REQUESTS, sampling), there.generate(REQUESTS, sampling)
        for mine, theirs in zip(expected, found, strict=True):
            assert theirs.response_ids == mine.response_ids
            assert theirs.stop_reason == mine.stop_reason
            torch.testing.assert_close(theirs.logprobs, mine.logprobs, atol=1e-5, rtol=0)
    there.close()


def test_without_vllm_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert vllm_unavailable() == "vLLM is not installed"
    with pytest.raises(UserError, match=r"not installed; install .* or use .*HFEngine") as caught:
        VLLMEngine().start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    assert "\n" not in str(caught.value)


def test_what_ends_it_is_told(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    def fails(error: Exception) -> Any:
        def generate(*_: Any, **__: Any) -> Any:
            raise error

        return generate

    outcomes: list[tuple[Exception, type[Exception], str]] = [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), RunStoppedError, "memory. Tried"),
        (EngineDeadError(), RunStoppedError, "vLLM's own processes have ended"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ]
    for error, kind, message in outcomes:
        monkeypatch.setattr(engine._llm, "generate", fails(error))
        with pytest.raises(kind, match=message):
            engine.generate([Request([3], 0)], Sampling(max_new_tokens=2))


class _RecordedError(Exception):
    """Raised instead of a start of vLLM."""


def _arguments(engine: VLLMEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments that an engine starts vLLM with."""
    found: dict[str, Any] = {}

    def record(**arguments: Any) -> None:
        found.update(arguments)
        raise _RecordedError

    monkeypatch.setattr("vllm.LLM", record)
    with pytest.raises(_RecordedError):
        engine.start(ModelSource(str(folder)), max_length=MAX_LENGTH)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's memory")
def test_every_engine_has_a_cache_of_its_own_size(
    tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for size in (1, 3):
        engine = VLLMEngine(cpu_kv_cache_gib=size)
        found = _arguments(engine, tiny_model_dir(), monkeypatch)
        assert found["kv_cache_memory_bytes"] == size * 2**30
        assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ  # would win over every argument
    given = VLLMEngine(engine_args={"kv_cache_memory_bytes": 5})
    assert _arguments(given, tiny_model_dir(), monkeypatch)["kv_cache_memory_bytes"] == 5


@pytest.mark.parametrize(("world", "executor"), [(0, "mp"), (1, "mp"), (2, None)])
def test_tensor_parallelism_needs_a_run_of_one_process(
    world: int, executor: str | None, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process group of one process, the trainer's or another engine's, is no hindrance."""
    monkeypatch.setattr(dist, "is_initialized", lambda: world > 0)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: world)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    engine = VLLMEngine(tensor_parallel_size=2)
    if executor is None:
        with pytest.raises(UserError, match=r"tensor_parallel_size: got 2, expected 1"):
            engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    else:
        found = _arguments(engine, tiny_model_dir(), monkeypatch)
        assert found["distributed_executor_backend"] == executor


def _rank_with_an_engine(rank: int, rendezvous: str, first: Path, second: Path) -> None:
    """One of two ranks: engine beside the trainer's default group, which must survive it."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    engine = VLLMEngine()
    engine.start(ModelSource(str(first)), max_length=MAX_LENGTH)
    assert "LOCAL_RANK" not in os.environ, "Lightning takes it for a sign of its own launcher"
    other = reference_model(second)
    engine.load_weights(1, other.named_parameters())
    sampling = Sampling(max_new_tokens=8)
    requests = REQUESTS[: 3 + 4 * rank]  # ranks need not ask for equally much
    assert_scored_by(other, requests, engine.generate(requests, sampling), sampling)
    if rank == 1:
        engine.generate(REQUESTS, sampling)  # nor equally often
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    engine.close()
    dist.all_reduce(total)
    assert total.item() == 4
    dist.destroy_process_group()


@pytest.mark.slow
def test_engines_live_and_die_beside_the_trainers_process_group(
    tiny_model_dir: Any, tmp_path: Path
) -> None:
    folders = (tiny_model_dir(tie=False), tiny_model_dir(tie=False, seed=1))
    torch.multiprocessing.spawn(
        _rank_with_an_engine, args=(f"file://{tmp_path}/rendezvous", *folders), nprocs=2
    )


@pytest.mark.last
def test_wrong_names_are_refused(engine: VLLMEngine, tiny_model_dir: Any) -> None:
    """A refused push leaves the engine unusable."""
    weights = reference_model(tiny_model_dir()).named_parameters()
    engine.version = 5
    with pytest.raises(UserError, match="'surprise'"):
        engine.load_weights(6, [*weights, ("surprise", torch.zeros(1))])
    assert engine.version == 5
