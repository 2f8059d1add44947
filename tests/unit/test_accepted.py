"""Requests that a server accepts: those of trainers, and no others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_lightning.models.source import ModelSource
from opd_lightning.serving.accepted import LIMITS, RefusedError, check
from opd_lightning.serving.checked_requests import CheckedRequests
from opd_lightning.serving.pushed_folder import PushedFolder
from opd_lightning.serving.scoring import ScoreRequest
from tests.conftest import TinyModelDir

GENERATE = "/inference/v1/generate"
SAMPLING: dict[str, Any] = {
    "temperature": 0.7, "top_p": 1, "top_k": 0, "max_tokens": 4, "seed": 7, "logprobs": 0,
    "stop_token_ids": [1], "ignore_eos": True, "detokenize": False,
}  # fmt: skip
RIGHT: dict[str, Any] = {"model": "m", "token_ids": [3, 4], "sampling_params": SAMPLING}


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "vocabulary", 64)


def post(path: str, body: Any) -> None:
    check("POST", path, "", body if isinstance(body, bytes) else json.dumps(body).encode())


def sampling(**changes: Any) -> dict[str, Any]:
    return {**RIGHT, "sampling_params": {**SAMPLING, **changes}}


def test_what_trainers_ask_is_accepted() -> None:
    for by_id in (True, False):
        post(GENERATE, ScoreRequest([3, 4, 5], 1, 2, None, by_id, 64).body("m"))
        post(GENERATE, ScoreRequest([3, 4, 5], 1, 0, None, by_id, 64).body("m"))
    post(GENERATE, RIGHT)
    post(GENERATE, sampling(seed=None))
    post("/collective_rpc", {"method": "load_pushed", "args": ["/a"]})
    post("/collective_rpc", {"method": "pushed_sums", "args": [["a.weight"]]})
    post("/collective_rpc", {"method": "transfer_state"})
    post("/reset_prefix_cache", b"")
    check("POST", "/sleep", "level=2", b"")
    check("GET", "/v1/models", "", b"")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({**RIGHT, "tokens": 1}, "'tokens'"),
        (sampling(temprature=1), "sampling_params.'temprature'"),
        (sampling(temperature="0.7"), "sampling_params.temperature"),
        (sampling(temperature=True), "sampling_params.temperature"),
        (sampling(temperature=-1), "sampling_params.temperature"),
        (sampling(max_tokens=1.0), "sampling_params.max_tokens"),
        (sampling(top_k=2**40), "sampling_params.top_k"),
        (sampling(seed=2**64), "sampling_params.seed"),
        (sampling(detokenize=True), "sampling_params.detokenize"),
        (sampling(stop_token_ids=[64]), "sampling_params.stop_token_ids"),
        ({**RIGHT, "token_ids": [3, -1]}, "token_ids"),
        ({**RIGHT, "token_ids": [3, 64]}, "token_ids"),
        ({**RIGHT, "token_ids": [3, 4.0]}, "token_ids"),
        ({**RIGHT, "token_ids": []}, "token_ids"),
        ({**RIGHT, "token_ids": None}, "token_ids"),
        ({**RIGHT, "model": "a\nb"}, "model"),
        ({"token_ids": [3]}, "sampling_params"),
        ([], "body"),
        (b"", "token_ids"),
        (b"{", "body"),
        (b"\xff", "body"),
        (b"[" * 100_000, "body"),
        (b'{"token_ids": [1], "token_ids": [2]}', "'token_ids'"),
        (b'{"token_ids": [NaN]}', "NaN"),
        (b'{"token_ids": [1e999]}', "1e999"),
        (b'{"token_ids": [' + b"9" * 5000 + b"]}", "body"),
        ({**RIGHT, "token_ids": [10**4000]}, "token_ids"),
    ],
)
def test_any_other_body_is_refused_by_name(body: Any, field: str) -> None:
    with pytest.raises(RefusedError) as refused:
        post(GENERATE, body)
    line = str(refused.value)
    assert field in line
    assert len(line) <= 400
    assert "\n" not in line


@pytest.mark.parametrize(
    ("method", "path", "query", "status"),
    [
        ("POST", "/pause", "", 404),
        ("POST", "/v1/completions", "", 404),
        ("GET", "/docs", "", 404),
        ("POST", "/v1/models", "", 405),
        ("GET", GENERATE, "", 405),
        ("GET", "/v1/models", "x=1", 400),
        ("POST", "/sleep", "level=9", 400),
    ],
)
def test_any_other_route_is_refused(method: str, path: str, query: str, status: int) -> None:
    with pytest.raises(RefusedError) as refused:
        check(method, path, query, b"")
    assert refused.value.status == status


@pytest.mark.parametrize(
    "body",
    [
        {"method": "shutdown"},
        {"method": ["load_pushed"]},
        {"method": "load_pushed"},
        {"method": "load_pushed", "args": ["/a", "/b"]},
        {"method": "load_pushed", "args": [1]},
        {"method": "load_pushed", "args": ["/a"], "kwargs": {}},
        {"method": "transfer_state", "args": [1]},
        {},
    ],
)
def test_workers_are_called_by_few_methods(body: Any) -> None:
    with pytest.raises(RefusedError, match=r"method|args"):
        post("/collective_rpc", body)


# The middleware ---------------------------------------------------------------------------


class App:
    """Receives what passes."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])


def ask(app: App, path: str, *parts: bytes, gone: bool = False) -> list[Any]:
    messages: Iterator[dict[str, Any]] = iter(
        [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        + [{"type": "http.disconnect"} if gone else {"type": "http.request"}]
    )
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    asyncio.run(CheckedRequests(app)(scope, receive, send))
    return sent


def test_a_body_in_parts_reaches_the_app_whole() -> None:
    app, body = App(), json.dumps(RIGHT).encode()
    assert ask(app, GENERATE, body[:9], body[9:]) == []
    assert ask(app, GENERATE, body[:9], gone=True) == []
    start, end = ask(app, GENERATE, body[:9])
    assert start["status"] == 400
    assert "body" in json.loads(end["body"])["error"]
    assert app.bodies == [body]


# Pushed weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda own, first: {n: t for n, t in own.items() if n != first}, "1 of .* missing"),
        (
            lambda own, first: {**own, "more.weight": torch.zeros(2)},
            "'more.weight' is not a tensor",
        ),
        (lambda own, first: {**own, first: own[first][:1].clone()}, "has shape"),
        (lambda own, first: {}, "missing"),
        (None, "cannot be read"),
    ],
)
def test_a_push_of_other_weights_is_refused(
    tiny_model_dir: TinyModelDir, tmp_path: Path, damage: Any, told: str
) -> None:
    own = load_file(tiny_model_dir() / "model.safetensors")
    pushed = PushedFolder(ModelSource(str(tiny_model_dir())))
    with pytest.raises(RefusedError, match="no weights in"):
        pushed.check(str(tmp_path))
    file = tmp_path / "0.safetensors"
    save_file(own, file)
    pushed.check(str(tmp_path))
    if damage is None:
        file.write_bytes(file.read_bytes()[:100])
    else:
        save_file(damage(own, min(own)), file)
    with pytest.raises(RefusedError, match=told):
        pushed.check(str(tmp_path))
