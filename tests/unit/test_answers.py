"""What a server may answer: only an answer to the request is taken, and its numbers as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opd_lightning.serving.connection import LostError
from opd_lightning.serving.generation import read_response
from opd_lightning.serving.scoring import ScoreRequest
from opd_lightning.types import StopReason
from tests.fuzz.clients import PROMPT, RESPONSE, TOP_K, by_id, by_rank, generated
from tests.fuzz.mutations import edited, put, without

Change = Callable[[Any], Any]
NAN = float("nan")
LIMITS: Any = {"most": 3, "vocabulary": 64, "eos_ids": [1]}
CHOICE = ("choices", 0)
CONTENT = (*CHOICE, "logprobs", "content")


def test_a_response_is_read_as_it_is() -> None:
    completion, labels = read_response(generated(), **LIMITS)
    assert completion.response_ids == RESPONSE
    assert completion.logprobs == [-0.5 - token / 4 for token in RESPONSE]
    assert completion.stop_reason is StopReason.EOS
    assert labels == ["default"]
    cut = put(generated(), (*CHOICE, "finish_reason"), "length")
    assert read_response(cut, **LIMITS).completion.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ((*CHOICE, "finish_reason"), None, "finish_reason"),
        ((*CHOICE, "finish_reason"), "error", "finish_reason"),
        ((*CHOICE, "token_ids"), [7, 8], "finish_reason"),  # stopped, but not at an <eos>
        ((*CHOICE, "token_ids"), [7, 64, 1], "token id 64"),
        ((*CHOICE, "token_ids"), [7, True, 1], "token_ids"),
        ((*CHOICE, "token_ids"), [], "token_ids"),
        ((*CHOICE, "token_ids"), [7, 7, 8, 1], "token_ids"),
        ((*CHOICE, "token_ids"), [8, 1], "logprobs"),
        ((*CONTENT, 0, "logprob"), NAN, "log-prob nan"),
        ((*CONTENT, 0, "logprob"), 0.5, "log-prob 0.5"),
        ((*CONTENT, 0, "logprob"), "-1", "logprob"),
        ((*CONTENT, 0), None, "logprobs"),
        ((*CHOICE, "logprobs"), None, "logprobs"),
        ((*CHOICE, "weight_versions"), [], "weight_versions"),
        ((*CHOICE, "weight_versions"), [{"version": 3}], "version"),
        (("choices",), [], "choices"),
        (("choices",), [1], "finish_reason"),
    ],
)
def test_another_response_is_refused_by_name(path: Any, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_response(put(generated(), path, value), **LIMITS)


@pytest.mark.parametrize("path", [("choices",), (*CHOICE, "token_ids"), (*CHOICE, "logprobs")])
def test_a_missing_field_is_named(path: Any) -> None:
    with pytest.raises(ValueError, match=f"'{path[-1]}' is missing"):
        read_response(without(generated(), path), **LIMITS)


def test_a_response_that_was_broken_off_is_asked_for_again() -> None:
    """A server that is paused says so; its half of a response is not one that reached the limit."""
    with pytest.raises(LostError):
        read_response(put(generated(), (*CHOICE, "finish_reason"), "abort"), **LIMITS)


def request(
    top_k: int, *, ids: list[list[int]] | None = None, matrix: bool = False
) -> ScoreRequest:
    given = None if ids is None else np.array(ids)
    return ScoreRequest([*PROMPT, *RESPONSE], len(PROMPT), top_k, given, matrix, 64)


def test_scores_are_read_as_they_are() -> None:
    answer = request(TOP_K, ids=[[2], [1], [0]]).read(by_rank(PROMPT, RESPONSE))
    own = [-2.5 - token / 8 for token in RESPONSE[:2]]  # the third is one of the three best
    np.testing.assert_allclose(answer.logprobs, [*own, -0.5])
    assert answer.top_ids.tolist() == [[0, 1, 2]] * 3
    np.testing.assert_allclose(answer.top_logprobs, [[-0.25, -0.5, -0.75]] * 3)
    np.testing.assert_allclose(answer.given_logprobs, [[-0.75], [-0.5], [-0.25]])
    np.testing.assert_allclose(request(0, matrix=True).read(by_id(3)).logprobs, [-1.5] * 3)


LAST = ("prompt_logprobs", 5)
FIRST = {"logprob": -0.1, "rank": 0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: put(a, ("prompt_logprobs",), None), "prompt_logprobs"),
        (lambda a: put(a, ("prompt_logprobs",), a["prompt_logprobs"][:-1]), "one for each token"),
        (lambda a: put(a, LAST, None), "prompt_logprobs"),
        (lambda a: without(a, ("prompt_logprobs", 4, "8")), "'8' is missing"),
        # Fewer than were asked for: NumPy would repeat a single one.
        (lambda a: put(a, LAST, {"1": {"logprob": -1.0, "rank": 1}}), "got 1 tokens"),
        (lambda a: put(a, (*LAST, "1", "logprob"), NAN), "log-prob nan"),
        (lambda a: put(a, (*LAST, "1", "logprob"), 2.0), "log-prob 2"),
        (lambda a: put(a, (*LAST, "1", "logprob"), None), "null"),
        (lambda a: put(a, (*LAST, "1", "rank"), None), "rank"),
        (lambda a: put(a, (*LAST, "1", "rank"), 0), "another order"),
        (lambda a: edited(a, LAST, lambda one: {**one, "99": FIRST}), "token id 99"),
        (lambda a: edited(a, LAST, lambda one: {**one, "01": FIRST}), "got 2 tokens"),
        (lambda a: [], "prompt_logprobs"),
    ],
)
def test_other_scores_are_refused_by_name(change: Change, told: str) -> None:
    answer = change(json.loads(json.dumps(by_rank(PROMPT, RESPONSE))))
    with pytest.raises(ValueError, match=told):
        request(TOP_K).read(answer)


@pytest.mark.parametrize("rows", [0, 1, 2, 4])
def test_a_matrix_of_another_shape_is_refused(rows: int) -> None:
    with pytest.raises(
        ValueError, match=rf"shape \[{rows}, 1\], expected float32 of shape \[3, 1\]"
    ):
        request(0, matrix=True).read(by_id(rows))
