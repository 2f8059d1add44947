"""Chat templates that raise, do not end or eat memory are refused in one line, with the row."""

from __future__ import annotations

import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.data.views import PromptView
from opd_lightning.errors import UserError
from opd_lightning.models import bounded, chat
from opd_lightning.models.chat import render, render_text
from opd_lightning.models.source import ModelSource
from opd_lightning.types import Prompt
from tests.conftest import TinyModelDir

PROMPT = Prompt(id="p", messages=({"role": "user", "content": "1"},), origin="rows.jsonl:1")


def templated(folder: Path, template: Any) -> Any:
    tokenizer = ModelSource(str(folder)).tokenizer
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ 1 + messages }}", "TypeError"),
        ("{{ messages[0].content.nothing.at.all }}", "nothing"),
        ("{{ range(10**9) }}", "OverflowError"),
        ("{% for m in messages %}", "end of template"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ({"one": "{{ 1 }}", "two": "{{ 2 }}"}, "default"),
    ],
)
def test_templates_that_raise_are_refused_with_the_row(
    tiny_model_dir: TinyModelDir, template: Any, said: str
) -> None:
    tokenizer = templated(tiny_model_dir(), template)
    with pytest.raises(UserError, match=said) as refused:
        render(PROMPT, tokenizer, {})
    assert str(refused.value).startswith("rows.jsonl:1: the student's chat template refuses")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=said):
        render_text(PROMPT.messages, tokenizer, {})


def test_one_of_several_templates_may_be_chosen(tiny_model_dir: TinyModelDir) -> None:
    tokenizer = templated(tiny_model_dir(), {"one": "1", "two": "2"})
    assert render(PROMPT, tokenizer, {"chat_template": "two"}) == tokenizer.encode("2")


def test_ids_are_those_of_the_tokenizer_itself(tiny_model_dir: TinyModelDir) -> None:
    tokenizer = ModelSource(str(tiny_model_dir())).tokenizer
    common: Any = {"add_generation_prompt": True, "return_dict": False}
    whole = tokenizer.apply_chat_template(list(PROMPT.messages), **common)
    assert render(PROMPT, tokenizer, {}) == whole
    cut = {"truncation": True, "max_length": 2}
    assert render(PROMPT, tokenizer, cut) == whole[:2]


def test_a_template_that_does_not_end_is_stopped_in_time(
    tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
    monkeypatch.setattr(bounded, "TIME_LIMIT", 0.05)
    alarm = signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM)
    for template in (loops, "{{ 7 ** (7 ** 9) }}"):
        tokenizer = templated(tiny_model_dir(), template)
        with pytest.raises(UserError, match=r"more than 0\.05 s"):
            render(PROMPT, tokenizer, {})
        with ThreadPoolExecutor() as threads, pytest.raises(UserError, match=r"more than 0\.05 s"):
            threads.submit(render, PROMPT, templated(tiny_model_dir(), loops), {}).result()
    assert signal.getsignal(signal.SIGALRM) == alarm[1]
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (alarm[0] > 0)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
        "{% set n.l = n.l + ['x' * (10**6 + i)] %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}",
    ],
)
def test_a_template_that_eats_memory_is_refused(
    tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    tokenizer = templated(tiny_model_dir(), template)
    monkeypatch.setattr(bounded, "MEMORY_LIMIT", 2**27)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(UserError, match=r"more than 0\.125 GiB of memory"):
        render(PROMPT, tokenizer, {})
    with pytest.raises(UserError, match="GiB of memory"):
        PromptView(template=template).messages(PROMPT)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_text_that_is_too_long_to_encode_is_refused(
    tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = templated(tiny_model_dir(), "{{ 'x' * 101 }}")
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 101)
    render(PROMPT, tokenizer, {})
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 100)
    with pytest.raises(UserError, match="101 characters"):
        render(PROMPT, tokenizer, {})


def test_a_library_that_panics_is_an_error_like_others() -> None:
    class PanicException(BaseException):
        pass

    def panics() -> None:
        raise PanicException("index out of bounds")

    with pytest.raises(RuntimeError, match="index out of bounds"):
        bounded.bounded(panics)
    with pytest.raises(KeyboardInterrupt):
        bounded.bounded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
