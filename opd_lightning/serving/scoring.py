"""Requests for log-probs of given tokens to a vLLM server, and their answers.

Uses vLLM's token-in-token-out route, which returns log-probs of a prompt's tokens in two ways:

*by rank* (`prompt_logprobs`): the token itself and the top k tokens, for every position of the
prompt, as a JSON object per position. Supported by every server.

*by id* (`prompt_logprob_token_ids`): a matrix of ids from a position on, answered by a float32
matrix. Much less data; needs vLLM's second model runner, thus a GPU and Triton.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opd_lightning.serving.connection import LostError

PATH = "/inference/v1/generate"
WHOLE_VOCABULARY = 1024  # tokens; a larger one is not sent by rank


class Answer(NamedTuple):
    """Log-probs (nats) of n tokens, at temperature 1."""

    logprobs: np.ndarray  # [n] float32
    top_ids: np.ndarray  # [n, top_k] int64, most probable first
    top_logprobs: np.ndarray  # [n, top_k] float32
    given_logprobs: np.ndarray  # [n, K] float32


def concatenate(answers: Sequence[Answer], top_k: int, given: int) -> Answer:
    """Concatenate answers; `answers` may be empty."""
    floats = [np.zeros((0, width), np.float32) for width in (top_k, given)]
    nothing = Answer(np.zeros(0, np.float32), np.zeros((0, top_k), np.int64), *floats)
    return Answer(*(np.concatenate(parts) for parts in zip(nothing, *answers, strict=True)))


@dataclass(frozen=True)
class ScoreRequest:
    """Request for the log-probs of one sequence.

    Args:
        token_ids: The sequence `[start + n]`; its last n tokens are scored.
        start: Index of the first scored token, at least 1.
        top_k: Number of top tokens returned at each position.
        given_ids: Further ids `[n, K]` whose log-probs are returned; None for none.
        by_id: Whether the server supports requests by id.
    """

    token_ids: list[int]
    start: int
    top_k: int
    given_ids: np.ndarray | None
    by_id: bool

    def body(self, model: str) -> dict[str, Any]:
        """Return the request body. A server must generate at least one token; it is ignored."""
        parameters: dict[str, Any] = {"max_tokens": 1, "detokenize": False}
        if self._has_matrix():
            own = np.array(self._own())[:, None]
            given = own[:, :0] if self.given_ids is None else self.given_ids
            parameters["prompt_logprob_token_ids"] = np.hstack([own, given]).tolist()
            parameters["prompt_logprob_start"] = self.start - 1
        if self.given_ids is not None and not self.by_id:
            parameters["prompt_logprobs"] = -1
        elif self.top_k or not self._has_matrix():
            parameters["prompt_logprobs"] = self.top_k
        return {"model": model, "token_ids": self.token_ids, "sampling_params": parameters}

    def read(self, answer: dict[str, Any]) -> Answer:
        """Return the arrays of an answer; raise `LostError` if the request must be repeated."""
        count = len(self.token_ids) - self.start
        top_ids = np.zeros((count, self.top_k), dtype=np.int64)
        top_logprobs = np.zeros((count, self.top_k), dtype=np.float32)
        ranked = [_Position(entry) for entry in (answer["prompt_logprobs"] or [])[self.start :]]
        if self.top_k:
            for i, position in enumerate(ranked):
                top_ids[i], top_logprobs[i] = position.top(self.top_k)
        if self._has_matrix():
            matrix = _matrix(answer["prompt_token_id_logprobs"], count)
            return Answer(matrix[:, 0], top_ids, top_logprobs, matrix[:, 1:])
        own = [position.of(t) for position, t in zip(ranked, self._own(), strict=True)]
        given = np.zeros((count, 0), dtype=np.float32)
        if self.given_ids is not None:
            rows = zip(ranked, self.given_ids.tolist(), strict=True)
            given = np.array([[position.of(t) for t in ids] for position, ids in rows], np.float32)
        return Answer(np.array(own, np.float32), top_ids, top_logprobs, given)

    def _own(self) -> list[int]:
        return self.token_ids[self.start :]

    def _has_matrix(self) -> bool:
        return self.by_id and (self.given_ids is not None or self.top_k == 0)


class _Position(NamedTuple):
    """Answer by rank at one position: {"id": {"logprob": nats, "rank": from 1}}."""

    entries: dict[str, dict[str, Any]]

    def of(self, token: int) -> float:
        return float(self.entries[str(token)]["logprob"])

    def top(self, k: int) -> tuple[list[int], list[float]]:
        """Return ids and log-probs of the top k tokens, most probable first."""
        best = sorted(self.entries.items(), key=lambda item: item[1]["rank"])[:k]
        return [int(token) for token, _ in best], [entry["logprob"] for _, entry in best]


def _matrix(encoded: str | None, rows: int) -> np.ndarray:
    """Decode a float32 matrix, sent as an npy file in base64."""
    if encoded is None:  # vLLM drops it if it preempted the request for lack of cache
        raise LostError("told no log-probs of the ids that it was asked about", reached=True)
    matrix = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    assert len(matrix) == rows, matrix.shape
    return np.asarray(matrix, dtype=np.float32)
