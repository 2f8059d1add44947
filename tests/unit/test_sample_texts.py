"""`opd sample` reads and writes texts in any encoding of its streams."""

import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from opd_lightning.commands.sample import Question, chat, read_prompt, unread
from opd_lightning.data.views import PromptView, Renderer
from opd_lightning.errors import UserError
from opd_lightning.methods import OPD, OPSDK1
from opd_lightning.models.student import Student
from opd_lightning.rollouts import Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.signals import Interrupted
from opd_lightning.teachers import ByDomainTeacher, FrozenTeacher, Teacher
from opd_lightning.terminal.output import escape_unknown_characters
from opd_lightning.types import Message
from opd_lightning.verifiers import ExactMatch
from tests.conftest import TinyModelDir


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"12+\xff"), encoding="utf-8", errors=errors)
    with pytest.raises(UserError, match="prompt: got bytes on stdin that are no text in UTF-8"):
        read_prompt(None, stdin)


def test_a_conversation_goes_on_after_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines: Iterator[str] = iter(["\udcff", "1+1"])
    asked = []

    class Answering:
        def answer(self, messages: Any) -> str:
            asked.append(messages[-1]["content"])
            return "2"

    def read() -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    chat(Answering(), [], read)  # type: ignore[arg-type]
    assert asked == ["1+1"]
    assert "no text in UTF-8" in capsys.readouterr().err


def test_a_teacher_is_shown_the_turn_that_was_answered(tiny_model_dir: TinyModelDir) -> None:
    """Views that depend on the prompt alone are kept by the prompt's id."""
    source = Student(str(tiny_model_dir())).source
    views = {"privileged": PromptView()}
    renderer = Renderer(source.tokenizer, {}, views, source.eos_ids)
    question = Question(samples=1, sampling=Sampling(), privileged="1")
    first: list[Message] = [{"role": "user", "content": "1 + 1"}]
    longer: list[Message] = [
        *first,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2"},
    ]
    seen = []
    for messages in (first, longer, first):
        view = renderer.view("privileged", question.prompt(messages))
        assert view is not None
        seen.append(view)
    assert seen[0] == seen[2]
    assert len(seen[1]) > len(seen[0])


def test_fields_that_nothing_reads_are_named() -> None:
    student, sampling = Student("student"), Sampling()
    one, two = FrozenTeacher("one"), FrozenTeacher("two")
    asked = Question(samples=1, sampling=sampling, privileged="1", answer="2", domain="sums")

    def names(teacher: Teacher, question: Question = asked, **data: Any) -> list[str]:
        return unread(OPD(student, teacher), RolloutDataModule(**data), question)

    assert names(one) == ["--privileged", "--answer", "--domain"]
    assert names(ByDomainTeacher({"sums": one, "words": two})) == ["--privileged", "--answer"]
    assert names(one, verifier=ExactMatch(".*")) == ["--privileged"]
    assert names(one, Question(samples=1, sampling=sampling)) == []
    module, data = OPSDK1(student, one), RolloutDataModule(views={"privileged": PromptView()})
    assert "--privileged" not in unread(module, data, asked)


def test_ctrl_c_ends_a_conversation_and_a_signal_the_program() -> None:
    def end(interrupt: KeyboardInterrupt) -> None:
        def read() -> str:
            raise interrupt

        chat(None, [], read)  # type: ignore[arg-type]

    end(KeyboardInterrupt())
    with pytest.raises(Interrupted):  # the program exits with 143
        end(Interrupted(signal.SIGTERM))


def test_characters_that_stdout_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    escape_unknown_characters()
    print("é 😀", flush=True)
    assert written.getvalue() == b"\xe9 \\U0001f600\n"
