"""Requests to `opd serve`: bytes on a socket, with the key or without it.

Without FUZZ_VLLM in the environment the server is what `opd serve` puts in front of vLLM, whose
start takes half a minute of CPU time.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from tests import hostile_clients, servers
from tests.fuzz import mutations
from tests.fuzz.checked_server import CheckedServer
from tests.fuzz.kinds import Input, Kind
from tests.fuzz.outcome import Outcome

WITH_VLLM = "FUZZ_VLLM"
GENERATE = "/inference/v1/generate"
VOCABULARY, LENGTH = 64, 64  # of the tiny model, and of the server
KEY, MODEL, PUSHED = "{the key}", "{the model}", "{pushed}"  # known once the server runs
SECONDS = 20.0  # of the wall for one answer
RIGHT: dict[str, Any] = {
    "model": MODEL,
    "token_ids": [9, 10, 11, 12],
    "sampling_params": {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 4, "seed": 7, "logprobs": 0,
        "stop_token_ids": [1], "ignore_eos": True, "detokenize": False,
    },
}  # fmt: skip
SCORES: dict[str, Any] = {
    "model": MODEL,
    "token_ids": [9, 10, 11, 12, 13, 14],
    "sampling_params": {"max_tokens": 1, "detokenize": False, "prompt_logprobs": 2},
}
FRACTIONS = ("temperature", "top_p")  # whole numbers are fractions too, but not the reverse
# Routes and bodies that change nothing where they are right.
BODIES: tuple[tuple[str, Any], ...] = (
    (GENERATE, RIGHT), (GENERATE, RIGHT), (GENERATE, SCORES),
    ("/update_weight_version", {"new_version": "default"}),
    ("/collective_rpc", {"method": "load_pushed", "args": [f"{PUSHED}/same"]}),
    ("/collective_rpc", {"method": "pushed_sums", "args": [["model.norm.weight"]]}),
    ("/collective_rpc", {"method": "transfer_state"}),
)  # fmt: skip
# Folders with weights that are not this model's.
PUSHES = ("none", "fewer", "more", "narrower", "damaged", "empty")
PATHS = (
    "/v1/models", "/version", "/metrics", "/ping", "/health", "/load", "/weight_info",
    "/get_world_size", "/pause", "/resume", "/abort_requests", "/inference/v1/abort_requests",
    "/weight_checker", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
    "/v1/load_lora_adapter", "/server_info", "/reset_mm_cache", "/shutdown_weight_transfer_engine",
    "/scale_elastic_ep", "/start_draft_weight_update", "/docs", "/openapi.json", "/", "//", "/..",
    "/v1/models/", "*", "", "/inference/v1/generate/", "/INFERENCE/v1/generate",
    "/%69nference/v1/generate", "/\xe9", "/a b", "http://a/v1/models", "/invocations",
    "/is_sleeping", "/collective_rpc?method=shutdown", "/sleep?level=9",
    "/sleep?level=1&mode=keep", "/v1/models?x=1", "/" + "a" * 20_000,
)  # fmt: skip
METHODS = (
    "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "G\0T",
    "X" * 9,
)  # fmt: skip
# Lines of a head: (what, the line). "{size}" is the size of the body.
HEADERS = (
    ("two lengths", "Content-Length: {size}\r\nContent-Length: 5"),
    ("a length less", "Content-Length: 3"), ("a length too much", "Content-Length: 900"),
    ("a negative length", "Content-Length: -1"), ("a long length", "Content-Length: " + "9" * 40),
    ("a length in words", "Content-Length: ten"), ("chunked", "Transfer-Encoding: chunked"),
    ("identity", "Transfer-Encoding: identity"),
    ("compressed", "Content-Length: {size}\r\nContent-Encoding: gzip"),
    ("a form", "Content-Length: {size}\r\nContent-Type: multipart/form-data"),
    ("no content type", "Content-Length: {size}"),
    ("to be continued", "Content-Length: {size}\r\nExpect: 100-continue"),
    ("an upgrade", "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"),
    ("no length", "A: b"), ("many headers", "\r\n".join(["A: b"] * 3000)),
    ("a long header", "A: " + "b" * 70_000), ("a null", "A\0: b"),
    ("a folded header", "A: b\r\n c"), ("no colon", "A b"),
)  # fmt: skip
KEYS = (
    "", "Bearer", "Bearer wrong", "bearer {the key}", "Bearer {the key} ", "Basic {the key}",
    "{the key}", "Bearer \xff",
)  # fmt: skip


class Requests(Kind):
    """The server answers 4xx with one line, or 200 with all of the request heard, and goes on."""

    name = "requests"
    seconds = 2 * SECONDS

    def __init__(self) -> None:
        self._server: servers.RunningServer | CheckedServer | None = None
        self._expected: Any = None
        self._read = 0  # bytes of the server's log

    def prepare(self, base: Path) -> None:
        from tests.conftest import build_tiny_model

        (base / "model").mkdir()
        build_tiny_model(base / "model", hidden_size=64, layers=1, seed=0, tie=True)
        _write_pushes(base / "model", base / "pushed")
        if os.environ.get(WITH_VLLM):
            servers.START_SECONDS = 3600  # it may start beside many other programs
            options = ("--weights", "pushed", "--max_length", str(LENGTH))
            self._server = servers.RunningServer(base / "model", base, *options).wait()
        else:
            self._server = CheckedServer(base / "model", base)
        self._expected = self._ask(base)
        assert self._expected is not None, "the right request is not answered"

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()

    def make(self, random: Random, base: Path) -> Input:
        way = random.choices(
            ("body", "bytes", "route", "head", "raw", "push"), (50, 10, 14, 10, 6, 10)
        )[0]
        if way == "push":
            folder = random.choice(PUSHES)
            body = {"method": "load_pushed", "args": [f"{PUSHED}/{folder}"]}
            facts = {"refuse": "weights of another model were taken"}
            return Input(
                f"push {folder}",
                {"request": post("/collective_rpc", mutations.as_json(body).encode())},
                facts=facts,
            )
        path, body = random.choice(BODIES)
        if way == "body":
            return _changed(random, path, body)
        data = mutations.as_json(body).encode()
        if way == "bytes":
            data, what = mutations.damaged(random, data)
            facts = {} if _is_json(data) else {"refuse": f"what is no JSON: {what}"}
            return Input(f"{path}: {what}", {"request": post(path, data)}, facts=facts)
        if way == "route":
            method, route = random.choice(METHODS), random.choice(PATHS)
            content = post(route, data if random.random() < 0.5 else b"", method=method)
            return Input(f"{method!r:.12} {route!r:.40}", {"request": content})
        if way == "head":
            if random.random() < 0.5:
                what, line = random.choice(HEADERS)
                content = post(path, data, head=line.replace("{size}", SIZE))
            else:
                what = random.choice(KEYS)
                content = post(path, data, key=what)
                if what != f"Bearer {KEY} ":
                    return Input(
                        f"key {what!r}", {"request": content}, facts={"refuse": "a wrong key"}
                    )
            return Input(f"{path}: {what}", {"request": content})
        content, what = mutations.damaged(random, post(path, data))
        return Input(f"{path}, raw: {what}", {"request": content})

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        server = self._server
        assert server is not None
        began = time.monotonic()
        answer = self._send(given.files["request"], base)
        seconds = time.monotonic() - began
        late = answer is None
        status, told = _parsed(answer or b"")
        lines = [f"opd: error: {told}"] if 400 <= status < 500 or status == 0 else [told]
        code = 0 if status == 200 else 2 if 400 <= status < 500 or status == 0 else status
        ignored = given.facts.get("refuse", "") if status == 200 else ""
        if "unbounded" in told:
            lines = [f"opd: error: {told}", "opd: error: and it has several lines"]
        if not late:
            again = self._ask(base)
            if not server.is_running():
                server.restart().wait()
                return Outcome(-9, (), ["the server died"], seconds)
            late = again is None
            if again is not None and again != self._expected:
                return Outcome(1, (), [f"Traceback of values: {again!r:.150}"], seconds)
        with server.log.open("rb") as log:
            log.seek(self._read)
            written = log.read()
            self._read += len(written)
        lines += [
            line for line in written.decode(errors="replace").splitlines() if "Traceback" in line
        ]
        places = given.places if 400 <= status < 500 else ()
        return Outcome(code, (), lines, seconds, late, places=places, ignored=ignored)

    def _ask(self, base: Path) -> Any:
        """Return ids and log-probs of the right request; None if it is not answered in time."""
        answer = self._send(post(GENERATE, mutations.as_json(RIGHT).encode()), base)
        status, _ = _parsed(answer or b"")
        if status != 200 or answer is None:
            return None if answer is None else answer[:300]
        choice = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]
        logprobs = [round(token["logprob"], 4) for token in choice["logprobs"]["content"]]
        return choice["token_ids"], logprobs

    def _send(self, content: bytes, base: Path) -> bytes | None:
        """Send bytes; return what comes back, or None if nothing does in time."""
        from opd_lightning.models.identity import model_identity

        assert self._server is not None
        names = {
            KEY: self._server.key,
            MODEL: model_identity(str(base / "model")),
            PUSHED: str(base / "pushed"),
        }
        for name, value in names.items():
            content = content.replace(name.encode(), value.encode())
        # The size was counted before the names were put in.
        head, gap, body = content.partition(b"\r\n\r\n")
        head = head.replace(SIZE.encode(), str(len(body)).encode())
        received = b""
        until = time.monotonic() + SECONDS
        with socket.create_connection(
            hostile_clients.place(self._server.url), timeout=SECONDS
        ) as one:
            with suppress(ConnectionError):
                one.sendall(head + gap + body)
                one.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                try:
                    while part := one.recv(2**16):
                        received += part
                        if time.monotonic() > until:
                            return None
                except TimeoutError:
                    return None
        return received


SIZE = "{size of the body}"


def post(
    path: str, body: bytes, *, method: str = "POST", key: str = f"Bearer {KEY}", head: str = ""
) -> bytes:
    """Return a request whose connection ends after it."""
    about = head or f"Content-Length: {SIZE}\r\nContent-Type: application/json"
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: a",
        "Connection: close",
        f"Authorization: {key}",
        about,
    )
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _changed(random: Random, path: str, body: Any) -> Input:
    """Change one value of a body, or add a field."""
    change = mutations.changed(random, body, [mutations.descent(random, body)])
    key = change.path[-1]
    what = f"{path}: {change.told}"
    facts: dict[str, Any] = {}
    if change.what in ("key renamed", "key added", "key twice") and _adds(change, body):
        facts["refuse"] = f"an unknown or doubled field {mutations.shown(change.value)}"
    elif change.what == "value" and not _fits(mutations.at(body, change.path), change.value, key):
        facts["refuse"] = f"a value of another kind: {mutations.shown(change.value)}"
    return Input(
        what, {"request": post(path, mutations.as_json(change.tree).encode())}, facts=facts
    )


def _adds(change: mutations.Mutation, body: Any) -> bool:
    """Whether a field is there that was not there before, or one is there twice."""
    holder = mutations.at(body, change.path[:-1])
    return not isinstance(holder, Mapping) or str(change.value) not in holder


def _fits(old: Any, new: Any, key: Any) -> bool:
    """Whether a new value may be taken for one of the old one's kind."""
    if new is None:  # a field that is left out
        return key not in ("token_ids", "sampling_params", "method", "new_version") and isinstance(
            key, str
        )
    if isinstance(old, bool) or isinstance(new, bool):
        return type(old) is type(new)
    if isinstance(old, int | float) and isinstance(new, int | float):
        return abs(new) < 1e300 if key in FRACTIONS else type(old) is type(new)
    return type(old) is type(new)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(answer: bytes) -> tuple[int, str]:
    """Return status and message of an answer; 0 for a connection that was closed without one."""
    while answer.startswith(b"HTTP/1.1 100 "):  # another follows
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not answer.startswith(b"HTTP/1.1 ") or not words[1].isdigit():
        return 0, "the connection was closed"
    message: Any = body.decode(errors="replace")
    if int(words[1]) != 200:
        with suppress(ValueError):
            message = json.loads(body)
            for name in ("error", "message"):
                message = message.get(name, message) if isinstance(message, dict) else message
        if "\n" in str(message):
            message = f"unbounded: {str(message)[:200]!r}"
    return int(words[1]), str(message)[:2000] if int(words[1]) != 200 else ""


def _write_pushes(model: Path, folder: Path) -> None:
    """Write folders of weights: the model's own, and others."""
    import torch
    from safetensors.torch import load_file, save_file

    own = load_file(model / "model.safetensors")
    first = min(own)
    folders = {
        "same": own,
        "fewer": {name: tensor for name, tensor in own.items() if name != first},
        "more": {**own, "model.more.weight": torch.zeros(2)},
        "narrower": {**own, first: own[first][:1].clone()},
    }
    for name, tensors in folders.items():
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "00000.safetensors")
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    content = (folder / "same" / "00000.safetensors").read_bytes()
    (folder / "damaged" / "00000.safetensors").write_bytes(content[: len(content) // 2])
