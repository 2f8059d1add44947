"""Notes of a served model, against a server of one function on loopback."""

import logging
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from opd_lightning.data.views import PromptView, ResponseFacts
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.types import Prompt
from opd_lightning.verifiers import Part, Reflector, Verifier, WeightedVerifier
from tests.http_server import Server
from tests.served_chat import Serving, prompt, reply, text_of


class Equal(Verifier):
    """Scores equality with the answer, with a feedback of its own."""

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(p.answer == text) for p, text in zip(prompts, responses, strict=True)]

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str | None]:
        return [None if p.answer == r else "no" for p, r in zip(prompts, responses, strict=True)]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        return list(responses)


QUESTION = "{{ question }}{{ response }}: {{ reward }} {{ feedback }} ({{ answer }})"


def reflector(server: Server, question: str = QUESTION, **settings: Any) -> Reflector:
    settings = {"timeout_seconds": 2.0, **settings}
    return Reflector(Equal(), server.url, "judge", question, **settings)


def test_the_note_is_about_the_response_and_its_score(serve: Serving) -> None:
    server = serve(lambda asked: reply(f" note on {text_of(asked)}\n"))
    verifier = reflector(server, max_tokens=7)
    prompts, texts = [prompt("1+1="), prompt("1+1=")], ["2", "3"]
    verifier.check(prompts)
    assert verifier.score(prompts, texts).totals == [1.0, 0.0]
    assert not [asked for asked in server.asked if "messages" in asked]  # nobody reads a note yet
    notes = verifier.feedback(prompts, texts)
    assert notes == ["note on 1+1=2: 1.0 None (2)", "note on 1+1=3: 0.0 no (2)"]
    assert {asked["max_tokens"] for asked in server.asked if "messages" in asked} == {7}
    assert verifier.answers(texts) == texts
    again = pickle.loads(pickle.dumps(verifier))
    assert again.verify(prompts, texts) == [1.0, 0.0]
    assert again.feedback(prompts, texts) == notes


def test_a_view_shows_the_note(serve: Serving) -> None:
    server = serve(lambda asked: reply("Carry the one."))
    verifier = WeightedVerifier({"right": Part(verifier=reflector(server))})
    verifier.score([prompt("9+3=")], ["2"])
    (note,) = verifier.feedback([prompt("9+3=")], ["2"])
    view = PromptView(place="user", template="{{ question }} Note: {{ feedback }}")
    assert view.is_late
    (message,) = view.messages(prompt("9+3="), ResponseFacts(attempt="2", feedback=note)) or ()
    assert message["content"] == "9+3= Note: Carry the one."


def test_a_response_without_a_note_has_no_feedback(
    serve: Serving,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(asked: dict[str, Any]) -> tuple[int, Any]:
        replies = {"long": (400, {"error": "too long"}), "empty": reply(" ")}
        return replies.get(text_of(asked), reply("fine"))

    verifier = reflector(serve(answer), "{{ response }}")
    texts = ["long", "empty", "other"]
    verifier.verify([prompt()] * 3, texts)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        assert verifier.feedback([prompt()] * 3, texts) == [None, None, "fine"]
    assert "1 of 3 responses have no note" in caplog.text


def test_a_server_that_never_answers_ends_the_run(serve: Serving) -> None:
    verifier = reflector(serve(lambda asked: (400, {})))
    verifier.verify([prompt()], ["2"])
    with pytest.raises(RunStoppedError, match=r"Reflector: .* no request succeeded"):
        verifier.feedback([prompt()], ["2"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"question": "{{ rubric }}"}, "reads 'rubric'"),
        ({"question": "Anything?"}, r"Reflector\.question: does not read the `response`"),
        ({"max_tokens": 0}, "Reflector: 'max_tokens'"),
        ({"step_seconds": math.inf}, "step_seconds"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], problem: str) -> None:
    given = {"question": "{{ response }}", **settings}
    with pytest.raises(UserError, match=problem):
        Reflector(Equal(), "http://nowhere", "judge", **given)


def test_server_and_columns_are_checked_before_training(serve: Serving) -> None:
    server = serve(lambda asked: reply("1"))
    with pytest.raises(UserError, match="no 'privileged'"):
        reflector(server, "{{ response }} {{ privileged }}").check([prompt()])
    with pytest.raises(UserError, match=r"Reflector\.model: got 'other'"):
        Reflector(Equal(), server.url, "other", "{{ response }}").check([prompt()])
