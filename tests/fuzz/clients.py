"""Clients of servers, called with prepared answers, and what of those must come out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz import mutations
from tests.fuzz.kinds import Input
from tests.fuzz.stand_in import Reply, reply

# Of the tiny model: 64 tokens, <eos> is 1.
VOCABULARY, LENGTH = 64, 64
PROMPT, RESPONSE = [9, 10, 11], [7, 8, 1]
TOP_K = 3
LABEL = "default"
SCORE = "/inference/v1/generate"
TIMEOUT = 1.0  # seconds of a request

# Clients ----------------------------------------------------------------------------------------


def common(model: str) -> dict[str, Any]:
    """Return the right answers of the routes that are asked about the server and its weights."""
    from opd_lightning.models.identity import model_identity

    served = {"id": model_identity(model), "max_model_len": LENGTH}
    return {
        "/v1/models": {"object": "list", "data": [served]},
        "/version": {"version": "0.32.0"},
        "/weight_info": {"weight_version": LABEL},
        "/reset_prefix_cache": {"success": True},
        "/collective_rpc": {"results": [[[["model.norm.weight"], "torch.float32", [1.0, 2.0, 3]]]]},
        "/update_weight_version": {"success": True, "new_version": LABEL},
    }


def by_rank(prompt: list[int], response: list[int]) -> dict[str, Any]:
    """Return an answer that tells the three most probable tokens at every position."""
    best = {str(i): {"logprob": -0.25 * (i + 1), "rank": i + 1} for i in range(TOP_K)}
    positions: list[Any] = [None]
    for token in [*prompt, *response][1:]:
        entry = {str(token): {"logprob": -2.5 - token / 8, "rank": 9, "decoded_token": ""}}
        positions.append({**entry, **best})
    return {"request_id": "r", "choices": [], "prompt_logprobs": positions}


def by_id(rows: int) -> dict[str, Any]:
    """Return an answer that tells the log-prob of one id at every position."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.full((rows, 1), -1.5, np.float32))
    told = base64.b64encode(buffer.getvalue()).decode()
    return {"request_id": "r", "prompt_logprobs": None, "prompt_token_id_logprobs": told}


def generated() -> dict[str, Any]:
    """Return an answer that holds a response."""
    content = [{"token": f"token_id:{t}", "logprob": -0.5 - t / 4} for t in RESPONSE]
    choice = {
        "index": 0, "finish_reason": "stop", "token_ids": list(RESPONSE), "routed_experts": None,
        "logprobs": {"content": content}, "weight_versions": [{"version": LABEL, "start": 0}],
    }  # fmt: skip
    return {"request_id": "r", "choices": [choice], "prompt_logprobs": None}


def made(random: Random, model: str) -> Input:
    """Return an input with an answer that a server may give to a client, right or wrong."""
    client = random.choice([*CLIENTS])
    answers = CLIENTS[client].answers(model)
    route = random.choice(CLIENTS[client].routes)
    body = answers[route]
    how: dict[str, Any] = {}
    way = random.choices(("tree", "bytes", "http", "status", "slow"), (50, 12, 20, 13, 5))[0]
    if way == "tree":
        change = mutations.changed(random, body, [mutations.descent(random, body)])
        data = mutations.as_json(change.tree).encode()
        what = change.told
        sent = reply(data)
    elif way == "bytes":
        data, what = mutations.damaged(random, json.dumps(body).encode())
        sent = reply(data)
    elif way == "status":
        status = random.choice(
            (100, 204, 301, 307, 400, 401, 404, 413, 422, 429, 500, 502, 503, 599, 999)
        )
        hostile = random.choice(({"error": mutations.one(random, "x")}, mutations.one(random, {})))
        data, what = (
            mutations.as_json(hostile).encode(),
            f"status {status} with {mutations.shown(hostile)}",
        )
        sent = reply(data, status, keep=random.random() < 0.5)
    elif way == "slow":
        data, what = json.dumps(body).encode(), "late"
        how = random.choice(({"pause": 1.2 * TIMEOUT}, {"pause": 0.3 * TIMEOUT}, {"trickle": 0.02}))
        sent = reply(body)
    else:
        data = json.dumps(body).encode()
        content, what = mutations.damaged(random, reply(body).content)
        if random.random() < 0.4:
            what, head = random.choice(HEADS)
            content = head + data
        sent, how = Reply(content), {"keep": random.random() < 0.3}
    files = {"reply": sent.content, "body": data}
    how = {"keep": sent.keep, **how}
    facts = {"client": client, "route": route, "how": how}
    return Input(f"{client}, {route}: {what}", files, places=("a server has weights",), facts=facts)


HEADS: tuple[tuple[str, bytes], ...] = (
    ("compressed, it says", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"),
    ("a strange charset", b"HTTP/1.1 500 OK\r\nContent-Type: text/html; charset=rot13\r\n\r\n"),
    ("longer, it says", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"),
    ("shorter, it says", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
    ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -9\r\n\r\n"),
    ("chunked, it says", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("a redirection", b"HTTP/1.1 302 OK\r\nLocation: http://127.0.0.1:9/\r\n\r\n"),
    ("many headers", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n"),
    ("a long header", b"HTTP/1.1 200 OK\r\nA: " + b"b" * 500_000 + b"\r\n\r\n"),
    ("a cookie", b"HTTP/1.1 200 OK\r\nSet-Cookie: \xff=\x00; expires=never\r\n\r\n"),
    ("HTTP/9.9", b"HTTP/9.9 200 OK\r\n\r\n"), ("another protocol", b"220 mail ready\r\n"),
    ("nothing", b""),
)  # fmt: skip


# Clients ----------------------------------------------------------------------------------------


class Client(NamedTuple):
    """A way to ask servers.

    Attributes:
        ask: Asks the server at an address about a model, in an empty folder; returns what it has
            otherwise than the body that was sent, in words.
        routes: Routes whose answers are changed.
        score: The right answer of the route of scores and responses.
    """

    ask: Callable[[str, str, Path, bytes], str]
    routes: tuple[str, ...]
    score: Callable[[], dict[str, Any]]

    def answers(self, model: str) -> dict[str, Any]:
        return {**common(model), SCORE: self.score()}


def _teacher(url: str, model: str) -> Any:
    from opd_lightning.teachers import RemoteTeacher

    return RemoteTeacher(model, [url], patience=0.4, timeout=TIMEOUT)


def _check(url: str, model: str, folder: Path, body: bytes) -> str:
    teacher = _teacher(url, model)
    try:
        teacher.check([], 1.0)
        room = teacher.source.context_length
    finally:
        teacher.close()
    return "" if 0 < room <= 256 else f"the context length is {room}"


def _scores(top_k: int, ids: Any = None) -> Callable[[str, str, Path, bytes], str]:
    def ask(url: str, model: str, folder: Path, body: bytes) -> str:
        import torch

        from tests.batches import make_batch, make_rollout

        rollout = make_rollout(list(RESPONSE), prompt_ids=list(PROMPT))
        batch = make_batch([rollout], temperature=1.0)
        given = None if ids is None else torch.tensor(ids)
        teacher = _teacher(url, model)
        try:
            scores, known = teacher.score_top(batch, "student", top_k=top_k, ids=given)
        finally:
            teacher.close()
        tops = known.ids.tolist(), known.logprobs.tolist()
        return _wrong_scores(body, scores.logprobs[0].tolist(), *tops)

    return ask


def _wrong_scores(body: bytes, own: list[float], ids: Any, top: Any) -> str:
    """Describe the first number that is not what was sent; empty if there is none."""
    import numpy as np

    positions = json.loads(body)["prompt_logprobs"]
    for i, token in enumerate(RESPONSE):
        entries = positions[len(PROMPT) + i]
        wanted = [(token, own[i]), *zip(ids[i], top[i], strict=True)]
        if len({*ids[i]}) != len(ids[i]):
            return f"token {i}: the ids {ids[i]} are not distinct"
        for one, found in wanted:
            sent = float(np.float32(entries[str(one)]["logprob"]))
            if sent != found or not found <= 1e-3 or not 0 <= one < VOCABULARY:
                return f"token {i}: {found} of id {one}, sent {sent}"
    return ""


def _matrix(url: str, model: str, folder: Path, body: bytes) -> str:
    import numpy as np

    from opd_lightning.serving.client import Servers
    from opd_lightning.serving.scoring import ScoreRequest

    request = ScoreRequest([*PROMPT, *RESPONSE], len(PROMPT), 0, None, True, VOCABULARY)
    servers = Servers([url], patience=0.4, timeout=TIMEOUT)
    try:
        (future,) = servers.submit(SCORE, [request.body("m")], [request.read])
        answer = future.result()
    finally:
        servers.close()
    sent = np.load(io.BytesIO(base64.b64decode(json.loads(body)["prompt_token_id_logprobs"])))
    right = answer.logprobs.shape == (3,) and (answer.logprobs <= 1e-3).all()
    return "" if right and (sent[:, 0] == answer.logprobs).all() else f"{answer}"


def _response(url: str, model: str, folder: Path, body: bytes) -> str:
    from opd_lightning.models.source import ModelSource
    from opd_lightning.rollouts import Request, Sampling, VLLMServerEngine

    engine = VLLMServerEngine([url], patience=0.4, timeout=TIMEOUT)
    try:
        engine.start(ModelSource(model), max_length=32)
        (completion,) = engine.generate([Request(PROMPT, 0)], Sampling(max_new_tokens=3))
    finally:
        engine.close()
    tree = json.loads(body)
    choice = (tree if "choices" in tree else generated())["choices"][0]
    sent = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    if completion.response_ids != choice["token_ids"] or completion.logprobs != sent:
        return f"{completion}, sent {choice!r:.200}"
    if not all(0 <= token < VOCABULARY for token in completion.response_ids):
        return f"ids {completion.response_ids}"
    if not 1 <= len(sent) == len(completion.response_ids) <= 3 or not all(x <= 1e-3 for x in sent):
        return f"log-probs {sent}"
    reasons = {"stop": "eos", "length": "length"}
    if str(completion.stop_reason) != reasons.get(choice["finish_reason"]):
        return f"{choice['finish_reason']!r:.60} read as {completion.stop_reason}"
    if {span["version"] for span in choice["weight_versions"]} != {LABEL}:
        return f"weights {choice['weight_versions']!r:.60} were taken for {LABEL}"
    return ""


def _push(url: str, model: str, folder: Path, body: bytes) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from opd_lightning.models.source import ModelSource
    from opd_lightning.rollouts import VLLMServerEngine

    push = str(folder / "push")
    engine = VLLMServerEngine([url], push_folder=push, patience=0.4, timeout=TIMEOUT)
    try:
        engine.start(ModelSource(model), max_length=32)
        list(engine.weight_sums())
        trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        engine.load_weights(1, list(trained.named_parameters()))
    finally:
        engine.close()
    return "a push was taken for done by a server that says another label"


ABOUT_PUSHES = ("/weight_info", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version")
CLIENTS: dict[str, Client] = {
    "check of a teacher": Client(_check, ("/v1/models", SCORE), lambda: by_rank([0], [0])),
    "scores": Client(_scores(0), (SCORE,), lambda: by_rank(PROMPT, RESPONSE)),
    "scores of the top": Client(_scores(TOP_K), (SCORE,), lambda: by_rank(PROMPT, RESPONSE)),
    "scores of given ids": Client(
        _scores(0, [[0, 2], [1, 0], [2, 1]]), (SCORE,), lambda: by_rank(PROMPT, RESPONSE)
    ),
    "scores by id": Client(_matrix, (SCORE,), lambda: by_id(len(RESPONSE))),
    "response": Client(_response, ("/v1/models", "/version", SCORE, SCORE, SCORE), generated),
    "push": Client(_push, ABOUT_PUSHES, generated),
}
