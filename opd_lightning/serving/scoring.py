"""Log-probs of given tokens: what a vLLM server is asked, and what its answer says.

vLLM's token-in-token-out route. It has two ways to tell log-probs of a prompt's tokens:

*by rank* (`prompt_logprobs`): the token itself and the k likeliest, for every position of the
prompt, as a JSON object per position. Every server can.

*by id* (`prompt_logprob_token_ids`): a matrix of ids from a position on, answered by a float32
matrix. Much less to send and to read; needs vLLM's second model runner, thus a GPU and Triton.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opd_lightning.serving.wire import LostError

PATH = "/inference/v1/generate"
WHOLE_VOCABULARY = 1024  # tokens; a larger one is not sent by rank


class Answer(NamedTuple):
    """Natural log-probs of n tokens, at temperature 1."""

    logprobs: np.ndarray  # [n] float32
    top_ids: np.ndarray  # [n, top_k] int64, most likely first
    top_logprobs: np.ndarray  # [n, top_k] float32
    given_logprobs: np.ndarray  # [n, K] float32


def joined(answers: Sequence[Answer], top_k: int, given: int) -> Answer:
    """One after the other; there may be none."""
    floats = [np.zeros((0, width), np.float32) for width in (top_k, given)]
    nothing = Answer(np.zeros(0, np.float32), np.zeros((0, top_k), np.int64), *floats)
    return Answer(*(np.concatenate(parts) for parts in zip(nothing, *answers, strict=True)))


@dataclass(frozen=True)
class Question:
    """What is asked about one sequence.

    Args:
        token_ids: The sequence `[start + n]`; its last n tokens are scored.
        start: Where these begin, at least 1.
        top_k: How many of the likeliest tokens are told at each of them.
        given_ids: Further ids `[n, K]` whose log-probs are told; None for none.
        by_id: Whether the server can be asked by id.
    """

    token_ids: list[int]
    start: int
    top_k: int
    given_ids: np.ndarray | None
    by_id: bool

    def body(self, model: str) -> dict[str, Any]:
        """The request. A server must write at least one token; it is ignored."""
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
        """The arrays of an answer; `LostError` if it has to be asked again."""
        count = len(self.token_ids) - self.start
        top_ids = np.zeros((count, self.top_k), dtype=np.int64)
        top_logprobs = np.zeros((count, self.top_k), dtype=np.float32)
        ranked = [_Position(told) for told in (answer["prompt_logprobs"] or [])[self.start :]]
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
    """What is told by rank at one position: {"id": {"logprob": nats, "rank": from 1}}."""

    told: dict[str, dict[str, Any]]

    def of(self, token: int) -> float:
        return float(self.told[str(token)]["logprob"])

    def top(self, k: int) -> tuple[list[int], list[float]]:
        """The k likeliest, most likely first."""
        best = sorted(self.told.items(), key=lambda item: item[1]["rank"])[:k]
        return [int(token) for token, _ in best], [known["logprob"] for _, known in best]


def _matrix(encoded: str | None, rows: int) -> np.ndarray:
    """A float32 matrix, sent as an npy file in base64."""
    if encoded is None:  # vLLM drops it where a crowded cache made it begin anew
        raise LostError("told no log-probs of the ids that it was asked about", reached=True)
    matrix = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    assert len(matrix) == rows, matrix.shape
    return np.asarray(matrix, dtype=np.float32)
