"""Chat templates that raise or do not end are refused in one line, with the row."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.models import chat
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


def test_a_template_that_does_not_end_is_refused_in_time(
    tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "{% for i in range(3000) %}" * 2 + "{% endfor %}" * 2  # for seconds, not for years
    tokenizer = templated(tiny_model_dir(), loops)
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.05)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"more than 0\.05 s"):
        render(PROMPT, tokenizer, {})
    assert time.monotonic() - began < 5
