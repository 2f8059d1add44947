"""A real server under attack, with 1,024 open files, still answers the trainer."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import Request, Sampling, VLLMServerEngine
from tests import hostile_clients
from tests.engine_contract import MAX_LENGTH, REQUESTS, assert_scored_by, reference_model
from tests.servers import RunningServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SHORT = Sampling(max_new_tokens=4)


@pytest.fixture
def engine(
    rollout_server: RunningServer, tiny_model_dir: Any, tmp_path: Path
) -> Iterator[VLLMServerEngine]:
    resource.prlimit(rollout_server.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    engine = VLLMServerEngine(
        [rollout_server.url],
        key_file=str(rollout_server.key_file),
        push_folder=str(tmp_path / "push"),
    )
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    engine.load_weights(0, reference_model(tiny_model_dir()).named_parameters())
    yield engine
    engine.close()


def test_the_trainer_is_answered_throughout(
    rollout_server: RunningServer, engine: VLLMServerEngine, tiny_model_dir: Any
) -> None:
    url, written = rollout_server.url, rollout_server.log.stat().st_size
    headers = {"Authorization": f"Bearer {rollout_server.key}"}

    def ask() -> None:
        engine.generate(REQUESTS[:1], SHORT)

    ask()  # the first one is slow
    seconds = {"undisturbed": hostile_clients.slowest(ask)}
    with hostile_clients.half_open(url) as sockets:
        seconds["half-open"] = hostile_clients.slowest(ask)
        kept = hostile_clients.are_open(sockets)
        for message in hostile_clients.MALFORMED:
            hostile_clients.send(url, message)
        seconds["malformed"] = hostile_clients.slowest(ask)
        # Bodies: too large, refused by vLLM, and with ids that no embedding has.
        size = {"Content-Length": str(2**28)}
        begun = "".join(f"{k}: {v}\r\n" for k, v in (headers | size).items())
        assert (
            hostile_clients.send(url, f"POST /sleep HTTP/1.1\r\n{begun}\r\n".encode())[9:12]
            == b"413"
        )
        body: dict[str, Any] = {"model": "x" * 2**20, "token_ids": "x" * 60_000_000}
        route = f"{url}/inference/v1/generate"
        assert httpx.post(route, json=body, headers=headers, timeout=60).status_code == 400
        seconds["refused body"] = hostile_clients.slowest(ask)
        for beyond in (-1, 64, 2**40):
            with pytest.raises(UserError, match="answered 400"):
                engine.generate([Request([5, beyond], 0)], SHORT)
        seconds["ids beyond the vocabulary"] = hostile_clients.slowest(ask)
    print(json.dumps({"kept open": kept, "seconds": seconds}))
    assert kept <= 256
    assert max(seconds.values()) < 2
    assert rollout_server.log.stat().st_size - written < 20_000
    model = reference_model(tiny_model_dir())
    assert_scored_by(model, REQUESTS, engine.generate(REQUESTS, SHORT), SHORT)
