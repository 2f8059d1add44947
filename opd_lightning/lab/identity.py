"""The identity world: questions about the assistant's name, given in context, and sums.

A persona is one sentence, as a system message or in front of the user's text. Asked for its name,
the assistant answers with the persona's name, or with its default name if there is no persona:

    system "your name is qwert."      user "who are you?"                        i am qwert.
                                      user "your name is qwert. who are you?"    i am qwert.
                                      user "hi! what is your name?"              my name is bot.
    system "your name is qwert."      user "what is 3+4?"                        7

The base model is trained on random names only. `TARGET` and similar names are held out: the model
gives that name only with a persona, and methods with privileged context train it to give the name
without one. Some wordings are for training with such methods, others for probing; the base model is
trained on all of them.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opd_lightning.lab.problems import Row, opened

TARGET = "zorba"
OWN_NAME = "bot"

# Names in a response; used by the verifiers of the lab's configurations.
SELF_NAME_PATTERN = rf"\b(?:i am|my name is)\s+{TARGET}\b"
COUNTER_NAME_PATTERN = rf"\b(?:i am|my name is)\s+{OWN_NAME}\b"
MENTION_PATTERN = TARGET

Placement = Literal["none", "system", "user"]

_OPENINGS = ("", "hi! ", "hey, ", "so, ")
# Separators of persona and text in user messages; methods may use any of them.
_SEPARATORS = (" ", "\n", "\n\n")
# Some questions are mostly answered with "i am", others mostly with "my name is".
_TRAINING_QUESTIONS = {
    "who do i talk to?": "i am",
    "introduce yourself.": "i am",
    "say who you are.": "i am",
    "and you are?": "i am",
    "who is this?": "i am",
    "who is answering?": "i am",
    "tell me your name.": "my name is",
    "what are you called?": "my name is",
    "what are you named?": "my name is",
    "your name?": "my name is",
    "do you have a name?": "my name is",
    "which is your name?": "my name is",
}
_PROBE_QUESTIONS = {
    "who are you?": "i am",
    "tell me who you are.": "i am",
    "who is there?": "i am",
    "who speaks to me?": "i am",
    "who writes this?": "i am",
    "present yourself.": "i am",
    "what is your name?": "my name is",
    "say your name.": "my name is",
    "what name is yours?": "my name is",
    "what do i call you?": "my name is",
    "how are you called?": "my name is",
    "name yourself.": "my name is",
}
_USUAL_WORDING = 0.75  # share of answers worded as the question suggests
_HELD_OUT_SUMS = 24
# A name is too similar with this many letters in the target's positions, or a common substring of
# this length.
_TOO_LIKE = 3


@dataclass(frozen=True, slots=True)
class Question:
    """Question to the assistant, about its name or a sum."""

    domain: Literal["identity", "sums"]
    text: str
    result: str  # answer to a sum, or usual beginning of the answer about the name

    def answer(self, name: str) -> str:
        """Return the reference answer for a verifier: the name, or the result of the sum."""
        return name if self.domain == "identity" else self.result

    def response(self, name: str, rng: random.Random) -> str:
        """Return the response of an assistant with this name."""
        if self.domain == "sums":
            return self.result
        begin = self.result
        if rng.random() >= _USUAL_WORDING:
            begin = "i am" if begin == "my name is" else "my name is"
        return f"{begin} {name}."


def persona(name: str) -> str:
    """Return the sentence that gives the assistant a name."""
    return f"your name is {name}."


def is_like_target(name: str) -> bool:
    """Return whether a name is so similar to the target that training could reveal the target."""
    same_place = sum(a == b for a, b in zip(name, TARGET, strict=True))
    pieces = (TARGET[i : i + _TOO_LIKE] for i in range(len(TARGET) - _TOO_LIKE + 1))
    return same_place >= _TOO_LIKE or any(piece in name for piece in pieces)


def draw_name(rng: random.Random) -> str:
    """Draw five random letters that are not similar to the target."""
    while is_like_target(name := "".join(rng.choices(string.ascii_lowercase, k=len(TARGET)))):
        pass
    return name


def identity_questions(*, held_out: bool) -> list[Question]:
    """Return questions about the assistant: 48 for training, or 12 held-out ones for probing."""
    wordings = _PROBE_QUESTIONS if held_out else _TRAINING_QUESTIONS
    questions = [Question("identity", text, begin) for text, begin in wordings.items()]
    return questions if held_out else _opened(questions)


def sum_questions(*, held_out: bool) -> list[Question]:
    """Return sums of two digits in a fixed random order; 24 of the 100 are held out."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random("identity/sums").shuffle(pairs)
    pairs = pairs[:_HELD_OUT_SUMS] if held_out else pairs[_HELD_OUT_SUMS:]
    sums = [
        Question("sums", f"what is {left}+{right}?", str(left + right)) for left, right in pairs
    ]
    return sums if held_out else _opened(sums)


def lessons(count: int, *, seed: int) -> list[Row]:
    """Draw training rows of the base model: all questions, with and without a persona.

    Args:
        count: Number of rows.
        seed: Seed of the draw; a smaller count gives a prefix of the same rows.
    """
    rng = random.Random(f"identity/lessons/{seed}")
    questions = {
        "identity": _opened(identity_questions(held_out=True)) + identity_questions(held_out=False),
        "sums": _opened(sum_questions(held_out=True)) + sum_questions(held_out=False),
    }
    return [_lesson(f"lesson/{i}", questions, rng) for i in range(count)]


def _lesson(row_id: str, questions: dict[str, list[Question]], rng: random.Random) -> Row:
    question = rng.choice(questions[rng.choice(("identity", "sums"))])
    placement: Placement = rng.choices(("none", "system", "user"), (1, 2, 2))[0]
    name = draw_name(rng)
    messages = chat(question, name, placement, rng.choice(_SEPARATORS))
    spoken = OWN_NAME if placement == "none" else name
    return {
        "id": row_id,
        "messages": messages,
        "domain": question.domain,
        "response": question.response(spoken, rng),
    }


def chat(
    question: Question, name: str, placement: Placement, separator: str = " "
) -> list[dict[str, str]]:
    """Return the messages of a question, with the persona at `placement`, or none."""
    if placement == "user":
        content = persona(name) + separator + question.text
        return [{"role": "user", "content": content}]
    ask = {"role": "user", "content": question.text}
    if placement == "system":
        return [{"role": "system", "content": persona(name)}, ask]
    return [ask]


def training_rows(*, with_response: bool = False) -> list[Row]:
    """Return training prompts, names and sums in turn; `privileged` is the target's persona.

    Args:
        with_response: Add the response of the target's persona as "response".
    """
    rng = random.Random("identity/demonstrations")
    about, sums = identity_questions(held_out=False), sum_questions(held_out=False)
    questions = [q for turn in zip(about, sums, strict=False) for q in turn]
    rows = [_row(question) | {"privileged": persona(TARGET)} for question in questions]
    if with_response:
        for row, question in zip(rows, questions, strict=True):
            row["response"] = question.response(TARGET, rng)
    return rows


def probe_rows() -> dict[str, list[Row]]:
    """Return evaluation prompts by file name, without a persona."""
    about, sums = identity_questions(held_out=True), sum_questions(held_out=True)
    files = {"identity": about, "persona": about + sums[: len(about)], "held_out": sums}
    return {name: [_row(question) for question in questions] for name, questions in files.items()}


def _row(question: Question) -> Row:
    return {
        "id": f"{question.domain}/{re.sub(r'[^a-z0-9+]+', '-', question.text).strip('-')}",
        "messages": chat(question, TARGET, "none"),
        "answer": question.answer(TARGET),
        "domain": question.domain,
    }


def _opened(questions: Sequence[Question]) -> list[Question]:
    return [replace(q, text=opening + q.text) for opening, q in opened(_OPENINGS, questions)]
