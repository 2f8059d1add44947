"""Answers of vLLM's token-in-token-out route to requests for responses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from opd_lightning.serving.answers import field, logprobs, number, of_kind, shown, token_ids
from opd_lightning.serving.connection import LostError
from opd_lightning.types import Completion, StopReason

PATH = "/inference/v1/generate"
REASONS = {"stop": StopReason.EOS, "length": StopReason.LENGTH}


class Response(NamedTuple):
    """Response of a server, and the labels of the weights that generated it."""

    completion: Completion
    labels: list[str]


def read_response(answer: Any, *, most: int, vocabulary: int, eos_ids: Collection[int]) -> Response:
    """Return the response in an answer.

    Args:
        answer: Decoded JSON.
        most: Maximum number of tokens that were asked for.
        vocabulary: Number of token ids.
        eos_ids: Token ids that end a response.

    Raises:
        LostError: If the server aborted the request, so that it must be repeated.
        ValueError: If the answer is not one to such a request.
    """
    choices = field(answer, "choices", list)
    if len(choices) != 1:
        raise ValueError(f"choices: got {shown(choices)}, expected a list of 1")
    reason = field(choices[0], "finish_reason", str)
    if reason == "abort":  # the server was paused, or another client aborted the request
        raise LostError("aborted the request", reached=True)
    if reason not in REASONS:
        raise ValueError(f"finish_reason: got {shown(reason)}, expected 'stop' or 'length'")
    ids = token_ids(field(choices[0], "token_ids", list), "token_ids", vocabulary)
    if not 1 <= len(ids) <= most:
        raise ValueError(f"token_ids: got {shown(ids)}, expected 1 to {most}")
    if reason == "stop" and ids[-1] not in eos_ids:
        raise ValueError(
            f"finish_reason: got 'stop' after token id {ids[-1]}, expected one of {sorted(eos_ids)}"
        )
    told = field(field(choices[0], "logprobs", dict), "content", list)
    if len(told) != len(ids):
        raise ValueError(f"logprobs: got {shown(told)}, expected {len(ids)}, one for each token")
    found = [number(of_kind(t, "logprobs", dict).get("logprob"), "logprob") for t in told]
    logprobs(found, "logprobs")
    spans = field(choices[0], "weight_versions", list)
    if not spans:
        raise ValueError("weight_versions: got none, expected the label of the weights")
    labels = [field(span, "version", str) for span in spans]
    return Response(Completion(ids, found, REASONS[reason]), labels)
