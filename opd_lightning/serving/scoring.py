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

from opd_lightning.serving.answers import (
    ROUNDING,
    field,
    logprobs,
    number,
    of_kind,
    shown,
    token_ids,
)
from opd_lightning.serving.connection import LostError

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
        vocabulary: Number of token ids; the log-prob of others in the sequence is -inf, as they
            are padding of a larger head than the server's.
    """

    token_ids: list[int]
    start: int
    top_k: int
    given_ids: np.ndarray | None
    by_id: bool
    vocabulary: int

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
        ids = self._known(self.token_ids)
        return {"model": model, "token_ids": ids, "sampling_params": parameters}

    def read(self, answer: Any) -> Answer:
        """Return the arrays of an answer.

        Raises:
            LostError: If the request must be repeated.
            ValueError: If the answer is not one to this request.
        """
        count = len(self.token_ids) - self.start
        top_ids = np.zeros((count, self.top_k), dtype=np.int64)
        top = np.zeros((count, self.top_k), dtype=np.float32)
        ranked = self._ranked(answer) if self.top_k or not self._has_matrix() else []
        if self.top_k:
            for i, position in enumerate(ranked):
                top_ids[i], top[i] = position.top(self.top_k, self.vocabulary)
            _check_order(top)
        if self._has_matrix():
            width = 1 + (0 if self.given_ids is None else self.given_ids.shape[1])
            matrix = _matrix(_text_or_none(answer, "prompt_token_id_logprobs"), (count, width))
            return Answer(self._of_known(matrix[:, 0]), top_ids, top, matrix[:, 1:])
        own = [position.of(t) for position, t in zip(ranked, self._own(), strict=True)]
        given: np.ndarray = np.zeros((count, 0), dtype=np.float32)
        if self.given_ids is not None:
            rows = zip(ranked, self.given_ids.tolist(), strict=True)
            given = np.array([[position.of(t) for t in ids] for position, ids in rows], np.float32)
            given = given.reshape(self.given_ids.shape)
        found = self._of_known(logprobs(own, "prompt_logprobs"))
        return Answer(found, top_ids, top, logprobs(given, "prompt_logprobs"))

    def _ranked(self, answer: Any) -> list[_Position]:
        """Return the positions of the scored tokens."""
        told = field(answer, "prompt_logprobs", list)
        if len(told) != len(self.token_ids):
            raise ValueError(
                f"prompt_logprobs: got {shown(told)}, expected {len(self.token_ids)}, one for "
                "each token"
            )
        return [_Position(of_kind(one, "prompt_logprobs", dict)) for one in told[self.start :]]

    def _own(self) -> list[int]:
        return self._known(self.token_ids[self.start :])

    def _known(self, ids: list[int]) -> list[int]:
        """Return ids with any of the vocabulary in place of others, which servers refuse."""
        return [min(token, self.vocabulary - 1) for token in ids]

    def _of_known(self, logprobs: np.ndarray) -> np.ndarray:
        """Return the log-probs of the scored tokens, -inf for ids beyond the vocabulary."""
        unknown = np.array(self.token_ids[self.start :]) >= self.vocabulary
        return np.where(unknown, np.float32(-np.inf), logprobs)

    def _has_matrix(self) -> bool:
        return self.by_id and (self.given_ids is not None or self.top_k == 0)


class _Position(NamedTuple):
    """Answer by rank at one position: {"id": {"logprob": nats, "rank": from 1}}."""

    entries: dict[str, dict[str, Any]]

    def of(self, token: int) -> float:
        entry = field(self.entries, str(token), dict)
        return number(entry.get("logprob"), f"logprob of token {token}")

    def top(self, k: int, vocabulary: int) -> tuple[list[int], list[float]]:
        """Return ids and log-probs of the top k tokens, most probable first."""
        best = sorted(self.entries, key=lambda token: field(self.entries[token], "rank", int))[:k]
        ids = token_ids((int(token) for token in best), "prompt_logprobs", vocabulary)
        if len(set(ids)) != k:
            raise ValueError(f"prompt_logprobs: got {len(set(ids))} tokens, expected {k}")
        return ids, [self.of(token) for token in ids]


def _text_or_none(answer: Any, name: str) -> str | None:
    """Return a text, or None where it is null or missing."""
    told = of_kind(answer, "the answer", dict).get(name)
    return None if told is None else of_kind(told, name, str)


def _check_order(top: np.ndarray) -> None:
    """Raise ValueError unless log-probs `[n, k]` are in order, and none above 0."""
    logprobs(top, "prompt_logprobs")
    if (top[:, 1:] > top[:, :-1] + ROUNDING).any():
        raise ValueError("prompt_logprobs: got ranks in another order than that of the log-probs")


def _matrix(encoded: str | None, shape: tuple[int, int]) -> np.ndarray:
    """Decode a float32 matrix, sent as an npy file in base64."""
    if encoded is None:  # vLLM drops it if it preempted the request for lack of cache
        raise LostError("told no log-probs of the ids that it was asked about", reached=True)
    data = base64.b64decode(encoded, validate=True)
    matrix = np.load(io.BytesIO(data), allow_pickle=False)
    if matrix.shape != shape or matrix.dtype.kind != "f":
        raise ValueError(
            f"prompt_token_id_logprobs: got {matrix.dtype} of shape {list(matrix.shape)}, expected "
            f"float32 of shape {list(shape)}"
        )
    return logprobs(matrix, "prompt_token_id_logprobs")
