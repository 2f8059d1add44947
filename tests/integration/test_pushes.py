"""Pushes through vLLM's weight transfer, over gloo, to a real server: what works and what fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opd_lightning.errors import EngineMismatchError, PushLostError, UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import PushedWeights
from opd_lightning.models.weights import full_weights
from opd_lightning.rollouts import HFEngine, Sampling, VLLMServerEngine, push_transfer
from opd_lightning.serving import transfer_client
from tests.engine_contract import MAX_LENGTH, REQUESTS, assert_scored_by, reference_model
from tests.forked_server import call
from tests.processes import call_ranks
from tests.servers import RunningServer
from tests.transfer_stand_in import StandIn

pytestmark = pytest.mark.vllm
SHORT = Sampling(max_new_tokens=8)
GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for a tiny model, and tensors that are larger than one."""
    from opd_lightning.rollouts import transfer_sender

    monkeypatch.setattr(transfer_sender, "CHUNK_BYTES", 20_000)


def engine_of(*servers: str, key_file: Path, model: Path, **options: Any) -> VLLMServerEngine:
    settings: dict[str, Any] = {"push": "gloo", "patience": 200.0, "timeout": 60.0, **options}
    engine = VLLMServerEngine(list(servers), key_file=str(key_file), **settings)
    engine.start(ModelSource(str(model)), max_length=MAX_LENGTH)
    return engine


@pytest.fixture
def models(tiny_model_dir: Any) -> list[Path]:
    return [tiny_model_dir(seed=seed) for seed in (0, 1)]


@pytest.fixture
def engine(rollout_server: RunningServer, models: list[Path]) -> Iterator[VLLMServerEngine]:
    engine = engine_of(rollout_server.url, key_file=rollout_server.key_file, model=models[0])
    yield engine
    engine.close()


def push_and_prove(engine: VLLMServerEngine, version: int, folder: Path) -> None:
    model = reference_model(folder)
    pushed = PushedWeights(model.named_parameters, engine.weights_dtype)
    engine.load_weights(version, pushed)
    assert pushed.check(version, engine.weight_sums()) == 1.0
    assert engine.version == version
    assert_scored_by(model, REQUESTS, engine.generate(REQUESTS, SHORT), SHORT)


def test_two_pushes_write_what_the_engine_in_process_does(
    engine: VLLMServerEngine, models: list[Path]
) -> None:
    here = HFEngine()
    here.start(ModelSource(str(models[0])), max_length=MAX_LENGTH)
    written = set()
    for version, folder in enumerate((models[1], models[0])):
        push_and_prove(engine, version, folder)
        here.load_weights(version, reference_model(folder).named_parameters())
        expected, found = (one.generate(REQUESTS, GREEDY) for one in (here, engine))
        assert [c.response_ids for c in found] == [c.response_ids for c in expected]
        written.add(str([c.response_ids for c in found]))
    assert len(written) == 2, "each push changed what is written"
    here.close()


def test_servers_with_several_workers_have_ranks_of_their_own(
    rollout_server: RunningServer, engine: VLLMServerEngine, models: list[Path]
) -> None:
    """Return a stand-in with two workers, which report the received tensors."""
    model = reference_model(models[1])
    with StandIn(engine._model, workers=2) as other:
        both = engine_of(
            other.url, rollout_server.url, key_file=rollout_server.key_file, model=models[0]
        )
        for version in (0, 1):
            both.load_weights(version, model.named_parameters())
        assert other.ranks == [1, 2], "the real server's is 3, or no group would have formed"
        assert len(other.groups) == 1, "the group of the first push served the second"
        for received in other.received:
            assert received.keys() == dict(model.named_parameters()).keys()
            assert all(torch.equal(received[n], t) for n, t in model.named_parameters())
        assert len(other.sizes) > 5
        assert all(size <= 20_000 + 4 * 64 * 128 for size in other.sizes), "bounded memory"
        assert other.keys == {f"Bearer {rollout_server.key}"}

        other.fails_at = 3  # chunks into the next push, it refuses to go on
        began = time.monotonic()
        with pytest.raises(PushLostError, match=r"interrupted: .*answered 500: no more") as caught:
            both.load_weights(2, model.named_parameters())
        assert time.monotonic() - began < 30
        assert "\n" not in str(caught.value)
        assert both.version == 1
        both.close()
    # The real one had half of it; it is as good as new.
    push_and_prove(engine, 3, models[0])


def test_a_group_that_cannot_form_is_told_in_one_line(
    engine: VLLMServerEngine, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transfer_client, "rank_offsets", lambda sizes, first: [9])
        with pytest.raises(PushLostError, match="rank 9 of a transfer group of 2"):
            engine.load_weights(0, reference_model(models[1]).named_parameters())
    push_and_prove(engine, 1, models[1])


def test_members_that_never_come_are_not_waited_for(
    rollout_server: RunningServer, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"key_file": rollout_server.key_file, "model": models[0]}
    engine = engine_of(rollout_server.url, timeout=5.0, **files)
    with monkeypatch.context() as patch:
        get_all = engine.servers.get_all
        more = [{"world_size": 2}]  # than the server has
        patch.setattr(
            engine.servers,
            "get_all",
            lambda path, *rest: more if "world_size" in path else get_all(path, *rest),
        )
        began = time.monotonic()
        with pytest.raises(
            PushLostError, match=r"no transfer group was formed: .* at 127\.0\.0\.1"
        ):
            engine.load_weights(0, reference_model(models[1]).named_parameters())
        assert time.monotonic() - began < 30
    push_and_prove(engine, 1, models[1])
    engine.close()


def test_names_that_do_not_fit_stop_the_push(engine: VLLMServerEngine, models: list[Path]) -> None:
    weights = list(reference_model(models[1]).named_parameters())
    engine.load_weights(5, weights)
    with pytest.raises(UserError, match="'surprise'"):
        engine.load_weights(6, [*weights, ("surprise", torch.zeros(1))])
    with pytest.raises(UserError, match=r"came where .* was announced.*push: folder"):
        engine.load_weights(6, weights[::-1])
    assert engine.version == 5
    with pytest.raises(EngineMismatchError, match="has weights '6-"):
        engine.generate(REQUESTS[:1], SHORT)
    push_and_prove(engine, 6, models[0])


def test_nccl_to_a_server_without_a_gpu_or_on_the_trainers_is_refused(
    rollout_server: RunningServer,
    engine: VLLMServerEngine,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push_transfer, "gpu_in_use", lambda: "the trainer's")

    def check(url: str) -> None:
        nccl = VLLMServerEngine([url], key_file=str(rollout_server.key_file), push="nccl")
        try:
            nccl.check(ModelSource(str(models[0])), max_length=MAX_LENGTH)
        finally:
            nccl.close()

    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"http://.* no GPU; use push: gloo"):
            check(rollout_server.url)
    with StandIn(engine._model, workers=2, gpus=["another", "the trainer's"]) as shares:
        with pytest.raises(UserError, match=r"got nccl, but http://.* and the trainer share a GPU"):
            check(shares.url)
        shares.gpus = ["another", "a third"]
        check(shares.url)


def _dying(url: str, key_file: Path, models: list[Path], how: signal.Signals) -> None:
    engine = engine_of(url, key_file=key_file, model=models[0], timeout=5.0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i, pair in enumerate(reference_model(models[1]).named_parameters()):
            if i == 12:
                os.kill(os.getpid(), how)
            yield pair

    from opd_lightning.rollouts import transfer_sender

    transfer_sender.CHUNK_BYTES = 20_000
    engine.load_weights(0, weights())


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_sender_that_dies_or_hangs_leaves_a_server_that_works(
    rollout_server: RunningServer, engine: VLLMServerEngine, models: list[Path], how: signal.Signals
) -> None:
    arguments = (rollout_server.url, rollout_server.key_file, models, how)
    sender = call(_dying, *arguments)
    state = Path(f"/proc/{sender.pid}/stat")
    while sender.poll() is None and state.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.05)
    began = time.monotonic()
    push_and_prove(engine, 1, models[1])
    assert time.monotonic() - began < 30
    sender.kill()
    sender.wait()


def _rank(rank: int, rendezvous: str, url: str, key_file: Path, models: list[Path]) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    engine = engine_of(url, key_file=key_file, model=models[0])
    for version, folder in enumerate(models):
        whole = reference_model(folder)
        model = type(whole)(whole.config)
        model.load_state_dict(whole.state_dict())
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        pushed = PushedWeights(partial(full_weights, model), engine.weights_dtype)
        engine.load_weights(version, pushed)
        assert pushed.check(version, engine.weight_sums()) == 1.0
        assert_scored_by(whole, REQUESTS[:5], engine.generate(REQUESTS[:5], SHORT), SHORT)
    with pytest.raises(UserError, match="'surprise'") as caught:
        engine.load_weights(9, [("surprise", torch.zeros(1))])
    assert vars(caught.value)["raised_by_all"], "so that one of them reports it"
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


def test_sharded_ranks_gather_and_the_first_sends(
    rollout_server: RunningServer, models: list[Path], tmp_path: Path
) -> None:
    arguments = (f"file://{tmp_path}/rendezvous", rollout_server.url, rollout_server.key_file)
    call_ranks(_rank, *arguments, models, count=2, timeout=280, start=call)


@pytest.mark.slow  # starts another server
@pytest.mark.last
def test_a_server_that_dies_in_a_push_and_comes_back_is_pushed_to_again(
    rollout_server: RunningServer, models: list[Path]
) -> None:
    files = {"key_file": rollout_server.key_file, "model": models[0]}
    engine = engine_of(rollout_server.url, **files)
    push_and_prove(engine, 0, models[0])
    model = reference_model(models[1])
    times = 0

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal times
        times += 1
        for i, pair in enumerate(model.named_parameters()):
            if i == 12 and times == 1:
                rollout_server.kill()
                threading.Thread(target=rollout_server.restart).start()
            yield pair

    pushed = PushedWeights(weights, torch.float32)
    engine.load_weights(1, pushed)
    assert times == 2
    assert pushed.check(1, engine.weight_sums()) == 1.0
    assert_scored_by(model, REQUESTS, engine.generate(REQUESTS, SHORT), SHORT)
    engine.close()
    rollout_server.wait()
