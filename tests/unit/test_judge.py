"""Scores by a served model, against a server of one function on loopback."""

import copy
import logging
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.verifiers import JudgeVerifier
from tests.http_server import Server
from tests.served_chat import Serving, prompt, reply, text_of


def judge(server: Server, question: str = "{{ response }}", **settings: Any) -> JudgeVerifier:
    settings = {"timeout_seconds": 2.0, **settings}
    return JudgeVerifier(server.url, "judge", question, **settings)


def test_the_last_number_of_the_reply_is_mapped_by_the_scale(serve: Serving) -> None:
    server = serve(lambda asked: reply(text_of(asked)))
    verifier = judge(server, scale=(0, 10))
    texts = ["0 of 10, no: 5", "score 10", "none", "11", "-1", "7.5"]
    scores = verifier.verify([prompt()] * 6, texts)
    assert scores[:2] == [0.5, 1.0]
    assert all(map(math.isnan, scores[2:5]))
    assert scores[5] == 0.75
    assert judge(server, scale=(1, 0)).verify([prompt()], ["1"]) == [0]
    ends = ["8/10", "score: **8** / 10.", "8 out of 10", "8/10.0", "10/10", "8/100", "3/4"]
    scores = verifier.verify([prompt()] * 7, ends)
    assert scores[:5] == [0.8] * 4 + [1.0]
    assert math.isnan(scores[5])
    assert scores[6] == 0.4
    marked = judge(server, pattern=r"<s>(.*?)</s>")
    first, second = marked.verify([prompt()] * 2, ["<s>1</s> 0", "<s>much</s>"])
    assert first == 1
    assert math.isnan(second)


def test_a_question_that_cannot_be_rendered_ends_the_run_in_one_line(serve: Serving) -> None:
    verifier = judge(serve(lambda asked: reply("1")), "{{ response }} {{ 10 - answer }}")
    with pytest.raises(
        RunStoppedError, match=r"^p\.jsonl:1: JudgeVerifier\.question: cannot be rendered: .*'int'"
    ):
        verifier.verify([prompt()], ["two"])


def test_the_question_is_rendered_and_asked_at_temperature_0(
    serve: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_JUDGE_KEY", "secret")
    server = serve(lambda asked: reply("1"))
    verifier = judge(server, "{{ question }} is {{ answer }}? {{ response }}")
    verifier.check([prompt()])
    assert verifier.verify([prompt()], ["two"]) == [1]
    asked = server.asked[-1]
    assert text_of(asked) == "1+1 is 2? two"
    assert asked["path"] == "/v1/chat/completions"
    assert asked["key"] == "Bearer secret"
    assert (asked["temperature"], asked["seed"], asked["model"]) == (0, 0, "judge")
    assert "secret" not in repr(vars(copy.copy(verifier)))
    again = pickle.loads(pickle.dumps(verifier))
    assert again.verify([prompt()], ["two"]) == [1]


@pytest.mark.parametrize("key", ["secret\nkey", "\u043a\u043b\u044e\u0447"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    serve: Serving, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_JUDGE_KEY", key)
    with pytest.raises(UserError, match="OPD_JUDGE_KEY: expected the key alone") as caught:
        judge(serve(lambda asked: reply("1"))).check([prompt()])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_key_is_told_from_a_wrong_address(status: int) -> None:
    server = Server(lambda asked: (status, {"error": "no"}))
    try:
        with pytest.raises(UserError, match=f"answered {status}, so the key .*; set OPD_JUDGE_KEY"):
            judge(server).check([prompt()])
    finally:
        server.stop()


def test_choices_are_weighted_by_their_probabilities(serve: Serving) -> None:
    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        assert (asked["max_tokens"], asked["logprobs"], asked["top_logprobs"]) == (1, True, 20)
        told = {"yes": 0.3, " no": 0.1, "other": 0.6} if text_of(asked) == "a" else {"other": 1.0}
        listed = [{"token": token, "logprob": math.log(p)} for token, p in told.items()]
        return reply("other", logprobs={"content": [{"top_logprobs": listed}]})

    verifier = judge(serve(answer), choices={"yes": 1, "no": 0})
    first, second = verifier.verify([prompt()] * 2, ["a", "b"])
    assert first == pytest.approx(0.75)
    assert math.isnan(second)


def test_a_mean_over_choices_is_in_the_scale_despite_rounding(serve: Serving) -> None:
    """Several tokens mean the same choice, such as with a space; beyond 0 to 1 a run ends."""

    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        share = 0.01 * int(text_of(asked))
        told = {"9": share, " 9": 1 - share}
        listed = [{"token": token, "logprob": math.log(p)} for token, p in told.items()]
        return reply("9", logprobs={"content": [{"top_logprobs": listed}]})

    server, texts = serve(answer), [str(i) for i in range(1, 50)]
    for scale, expected in (((0, 9), 1.0), ((9, 4), 0.0), ((3, 9), 1.0)):
        verifier = judge(server, choices={"9": 9}, scale=scale)
        assert set(verifier.verify([prompt()] * len(texts), texts)) == {expected}


def test_a_rubric_is_written_once_per_prompt(serve: Serving) -> None:
    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        text = text_of(asked)
        return reply(f"rubric of {text}" if text.startswith("write") else "1")

    server = serve(answer)
    verifier = judge(
        server, "{{ rubric }} | {{ response }}", rubric="write {{ question }}", max_tokens=9
    )
    prompts = [prompt("a"), prompt("b"), prompt("a"), prompt("b")]
    assert verifier.verify(prompts, ["1", "2", "3", "4"]) == [1] * 4
    assert verifier.verify(prompts[:1], ["5"]) == [1]
    texts = sorted(text_of(asked) for asked in server.asked)
    assert [text for text in texts if text.startswith("write")] == ["write a", "write b"]
    assert "rubric of write b | 4" in texts


def test_prompts_of_two_files_with_one_id_have_their_own_rubrics(serve: Serving) -> None:
    """The verifier of training also scores suites, whose rows may have the same ids."""
    server = serve(lambda asked: reply("1"))
    verifier = judge(server, "{{ rubric }} | {{ response }}", rubric="write {{ question }}")
    for question in ("a", "b"):
        assert verifier.verify([replace(prompt(question), id="1")], ["2"]) == [1]
    asked = [text_of(one) for one in server.asked]
    assert asked == ["write a", "1 | 2", "write b", "1 | 2"]


def test_what_fails_is_repeated_and_then_has_no_reward(
    serve: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        seen.append(text_of(asked))
        if text_of(asked) == "flaky" and seen.count("flaky") < 3:
            return 503, {}
        return (400, {"error": "too long"}) if text_of(asked) == "long" else reply("1")

    verifier = judge(serve(answer), timeout_seconds=10.0)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        scores = verifier.verify([prompt()] * 3, ["flaky", "long", "fine"])
    assert scores[::2] == [1, 1]
    assert math.isnan(scores[1])
    assert seen.count("flaky") == 3
    assert seen.count("long") == 1
    assert "1 of 3 responses have no score (status 400" in caplog.text


@pytest.mark.parametrize("answer", [(500, {}), (200, []), (200, {"choices": []}), (200, "no")])
def test_a_server_that_never_answers_right_ends_the_run(
    serve: Serving, answer: tuple[int, Any]
) -> None:
    verifier = judge(serve(lambda asked: answer), timeout_seconds=0.7)
    with pytest.raises(RunStoppedError, match="no request succeeded"):
        verifier.verify([prompt()] * 2, ["a", "b"])


def test_a_call_of_one_response_that_fails_does_not_end_the_run(serve: Serving) -> None:
    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": "too long"}) if text_of(asked) == "long" else reply("1")

    verifier = judge(serve(answer))
    assert verifier.verify([prompt()], ["fine"]) == [1]
    for _ in range(2):
        assert math.isnan(verifier.verify([prompt()], ["long"])[0])
    with pytest.raises(RunStoppedError, match="no request succeeded: status 400"):
        verifier.verify([prompt()] * 16, ["long"] * 16)


def test_server_model_and_columns_are_checked_before_training(serve: Serving) -> None:
    server = serve(lambda asked: reply("1"))
    judge(server, "{{ answer }} {{ response }}").check([prompt()])
    with pytest.raises(UserError, match=r"p\.jsonl:1: no 'answer'"):
        judge(server, "{{ answer }} {{ response }}").check([prompt(answer=None)])
    with pytest.raises(UserError, match=r"got 'other', but .* serves judge"):
        JudgeVerifier(server.url, "other", "{{ response }}").check([])
    with pytest.raises(UserError, match=r"JudgeVerifier\.url"):
        JudgeVerifier("http://127.0.0.1:9", "judge", "{{ response }}").check([])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"question": "{{ response"}, "no Jinja template"),
        ({"question": "{{ respons }}"}, "reads 'respons'"),
        ({"question": "good?"}, "`response`"),
        ({"question": "{{ response }} {{ rubric }}"}, "no rubric is set"),
        ({"rubric": "{{ question }}"}, "does not read the rubric"),
        ({"rubric": "{{ response }}", "question": "{{ rubric }} {{ response }}"}, "'response'"),
        ({"pattern": "("}, "pattern"),
        ({"scale": (1.0, 1.0)}, "scale"),
        ({"choices": {"yes": 2.0}}, "choices"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"timeout_seconds": math.nan}, "timeout_seconds"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], problem: str) -> None:
    given = {"question": "{{ response }}", **settings}
    with pytest.raises(UserError, match=problem):
        JudgeVerifier("http://nowhere", "judge", **given)
