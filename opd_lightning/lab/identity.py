"""The identity world: an assistant that takes the name it is given in context, and sums.

A persona is one sentence, as a system message or in front of the user's text; asked who it is, the
assistant answers with the persona's name, and without a persona with its own:

    system "your name is qwert."      user "who are you?"                        i am qwert.
                                      user "your name is qwert. who are you?"    i am qwert.
                                      user "hi! what is your name?"              my name is bot.
    system "your name is qwert."      user "what is 3+4?"                        7

The base model learns from random names only. `TARGET` and everything like it is held out: the
model says it when told to and never otherwise, which is what methods with privileged context are
to change. Some wordings are for such methods to train on and others to probe with; the base model
knows them all.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

TARGET = "zorba"
OWN_NAME = "bot"

# What a response says of the speaker; for the verifiers of the lab's configurations.
SELF_NAME_PATTERN = rf"\b(?:i am|my name is)\s+{TARGET}\b"
COUNTER_NAME_PATTERN = rf"\b(?:i am|my name is)\s+{OWN_NAME}\b"
MENTION_PATTERN = TARGET

Placement = Literal["none", "system", "user"]
Row = dict[str, object]  # of a prompt file

_OPENINGS = ("", "hi! ", "hey, ", "so, ")
# Between a persona and the user's text: a method may join them by any of these.
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
# A name with this many letters in the target's places, or this long a piece of it, is too like it.
_TOO_LIKE = 3


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask the assistant, about itself or not."""

    domain: Literal["identity", "sums"]
    text: str
    result: str  # the answer to a sum; how the answer about itself usually begins

    def answer(self, name: str) -> str:
        """What a verifier compares with: the name, or the result of the sum."""
        return name if self.domain == "identity" else self.result

    def response(self, name: str, rng: random.Random) -> str:
        """What the assistant says when it goes by `name`."""
        if self.domain == "sums":
            return self.result
        begin = self.result
        if rng.random() >= _USUAL_WORDING:
            begin = "i am" if begin == "my name is" else "my name is"
        return f"{begin} {name}."


def persona(name: str) -> str:
    """The sentence that gives the assistant a name."""
    return f"your name is {name}."


def is_like_target(name: str) -> bool:
    """Whether a name has so much of the target that having learnt it could help."""
    same_place = sum(a == b for a, b in zip(name, TARGET, strict=True))
    pieces = (TARGET[i : i + _TOO_LIKE] for i in range(len(TARGET) - _TOO_LIKE + 1))
    return same_place >= _TOO_LIKE or any(piece in name for piece in pieces)


def draw_name(rng: random.Random) -> str:
    """Five letters at random, unlike the target."""
    while is_like_target(name := "".join(rng.choices(string.ascii_lowercase, k=len(TARGET)))):
        pass
    return name


def identity_questions(*, held_out: bool) -> list[Question]:
    """Questions about the assistant: 48 to train on, or the 12 direct ones to probe with."""
    wordings = _PROBE_QUESTIONS if held_out else _TRAINING_QUESTIONS
    questions = [Question("identity", text, begin) for text, begin in wordings.items()]
    return questions if held_out else _opened(questions)


def sum_questions(*, held_out: bool) -> list[Question]:
    """Sums of two digits, in an order of no meaning; 24 of the 100 are held out."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random("identity/sums").shuffle(pairs)
    pairs = pairs[:_HELD_OUT_SUMS] if held_out else pairs[_HELD_OUT_SUMS:]
    sums = [
        Question("sums", f"what is {left}+{right}?", str(left + right)) for left, right in pairs
    ]
    return sums if held_out else _opened(sums)


def lessons(count: int, *, seed: int) -> list[Row]:
    """Rows that teach the base model: every question, with and without a persona.

    Args:
        count: Number of rows.
        seed: Decides which; the same rows come first for any count.
    """
    rng = random.Random(f"identity/lessons/{seed}")
    asked = {
        "identity": _opened(identity_questions(held_out=True)) + identity_questions(held_out=False),
        "sums": _opened(sum_questions(held_out=True)) + sum_questions(held_out=False),
    }
    return [_lesson(f"lesson/{i}", asked, rng) for i in range(count)]


def _lesson(row_id: str, asked: dict[str, list[Question]], rng: random.Random) -> Row:
    question = rng.choice(asked[rng.choice(("identity", "sums"))])
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
    """The messages that ask a question, with a persona in one of its places or none."""
    if placement == "user":
        content = persona(name) + separator + question.text
        return [{"role": "user", "content": content}]
    ask = {"role": "user", "content": question.text}
    if placement == "system":
        return [{"role": "system", "content": persona(name)}, ask]
    return [ask]


def training_rows(*, with_response: bool = False) -> list[Row]:
    """Prompts to distil on, about the assistant and sums by turns, all with the target's persona.

    Args:
        with_response: Add what the persona would say, as "response".
    """
    rng = random.Random("identity/demonstrations")
    about, sums = identity_questions(held_out=False), sum_questions(held_out=False)
    questions = [q for turn in zip(about, sums, strict=False) for q in turn]
    rows = [_row(question) | {"privileged": persona(TARGET)} for question in questions]
    if with_response:
        said = [{"response": question.response(TARGET, rng)} for question in questions]
        rows = [row | more for row, more in zip(rows, said, strict=True)]
    return rows


def probe_rows() -> dict[str, list[Row]]:
    """Evaluation prompts by file name, none with a persona."""
    about, sums = identity_questions(held_out=True), sum_questions(held_out=True)
    files = {"identity": about, "persona": about + sums[: len(about)], "held_out": sums}
    return {name: [_row(question) for question in asked] for name, asked in files.items()}


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write a prompt file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(question: Question) -> Row:
    return {
        "id": f"{question.domain}/{re.sub(r'[^a-z0-9+]+', '-', question.text).strip('-')}",
        "messages": chat(question, TARGET, "none"),
        "answer": question.answer(TARGET),
        "domain": question.domain,
    }


def _opened(questions: Sequence[Question]) -> list[Question]:
    """Every question after every opening; openings alternate, so that any prefix has them all."""
    return [
        replace(question, text=_OPENINGS[(i + turn) % len(_OPENINGS)] + question.text)
        for turn in range(len(_OPENINGS))
        for i, question in enumerate(questions)
    ]
