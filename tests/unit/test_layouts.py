"""Rows of public data sets are read by their columns, and ambiguous rows are refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.types import Prompt

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2="}
REPLY = {"role": "assistant", "content": "4"}
MORE = {"role": "user", "content": "And 3+3?"}
PERSON, MODEL = {"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [SYSTEM, USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "answer": "2+2=4\n#### 4"},
}


def saved(folder: Path, suffix: str, *rows: Any) -> str:
    """Write rows in one of the formats that are read."""
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([*rows]), path)
    else:
        datasets.Dataset.from_list([*rows]).save_to_disk(str(path))
    return str(path)


def read(folder: Path, row: Any, **columns: str) -> Prompt:
    (prompt,) = PromptSource(saved(folder, ".jsonl", row), columns=columns).load()
    return prompt


@pytest.mark.parametrize(
    ("row", "messages", "fields"),
    [
        # The assistant's last turn is the response; earlier turns stay in the prompt.
        ({"messages": [SYSTEM, USER, REPLY]}, [SYSTEM, USER], {"response": "4"}),
        ({"prompt": [USER, REPLY, MORE]}, [USER, REPLY, MORE], {"response": None}),
        ({"messages": [USER, REPLY, MORE, REPLY]}, [USER, REPLY, MORE], {"response": "4"}),
        ({"messages": [USER, REPLY], "response": "4"}, [USER], {"response": "4"}),
        ({"messages": [USER, REPLY | {"content": ""}]}, [USER], {"response": None}),
        # A system message in a column of its own.
        ({"system": "Be brief.", "prompt": "2+2="}, [SYSTEM, USER], {}),
        ({"system": "Be brief.", "messages": [SYSTEM, USER]}, [SYSTEM, USER], {}),
        ({"system": "", "messages": [SYSTEM, USER]}, [SYSTEM, USER], {}),
        # ShareGPT
        ({"conversations": [PERSON, MODEL]}, [USER], {"response": "4", "domain": "default"}),
        (
            {"id": "c7", "system": "Be brief.", "conversations": [PERSON, MODEL, PERSON]},
            [SYSTEM, USER, REPLY, USER],
            {"response": None, "id": "c7"},
        ),
        ({"conversations": [USER, REPLY], "messages": None}, [USER], {"response": "4"}),
        # Alpaca
        (
            {"instruction": "2+2=", "input": "", "output": "4", "text": "### Instruction"},
            [USER],
            {"response": "4", "answer": None},
        ),
        (
            {"instruction": "Add.", "input": "2 2", "output": "", "privileged": "four"},
            [{"role": "user", "content": "Add.\n2 2"}],
            {"response": None, "privileged": "four"},
        ),
        (
            {
                "instruction": "And 3+3?",
                "output": "6",
                "system": "Be brief.",
                "history": [["2+2=", "4"]],
            },
            [SYSTEM, USER, REPLY, MORE],
            {"response": "6"},
        ),
        # verl
        (VERL, [SYSTEM, USER], {"answer": "4", "domain": "openai/gsm8k", "privileged": None}),
        (VERL | {"domain": "sums", "answer": 4}, [SYSTEM, USER], {"answer": "4", "domain": "sums"}),
        (
            {"data_source": "x", "prompt": "2+2="},
            [USER],
            {"answer": None, "domain": "default"},
        ),
        # Two chats: the names of this project win, as in earlier versions, with a warning.
        ({"prompt": "2+2=", "conversations": [PERSON]}, [USER], {}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_a_row_is_read_by_its_columns(
    suffix: str, row: Any, messages: list[Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    (prompt,) = PromptSource(saved(tmp_path, suffix, row)).load()
    assert prompt.messages == tuple(messages)
    assert {name: getattr(prompt, name) for name in fields} == fields


def test_layouts_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpaca = [{"instruction": "a", "input": text, "output": "b"} for text in ("", "c", "")]
    path = saved(tmp_path, ".jsonl", *alpaca, VERL, {"prompt": "a"})
    PromptSource(path).load()
    first, second = capsys.readouterr().err.splitlines()
    assert "Alpaca: messages from instruction, response from output, input from input" in first
    assert "verl: answer from reward_model.ground_truth, domain from data_source" in second


def test_columns_of_nested_columns(tmp_path: Path) -> None:
    prompt = read(tmp_path, VERL, privileged="extra_info.answer", domain="ability")
    assert (prompt.privileged, prompt.domain, prompt.answer) == ("2+2=4\n#### 4", "math", "4")
    # A name with a dot is one column, and a listed chat turns recognition off.
    row = VERL | {"a.b": "5"}
    prompt = read(tmp_path, row, messages="prompt", answer="a.b")
    assert (prompt.answer, prompt.domain) == ("5", "default")
    with pytest.raises(UserError, match=r"has a column 'extra_info\.hint' for"):
        read(tmp_path, VERL, privileged="extra_info.hint")


def test_listed_columns_of_other_data_sets(tmp_path: Path) -> None:
    dolly = {"instruction": "Add.", "context": "2 2", "response": "4", "category": "sums"}
    prompt = read(tmp_path, dolly, input="context", domain="category")
    assert prompt.messages[0]["content"] == "Add.\n2 2"
    assert (prompt.response, prompt.domain) == ("4", "sums")
    orca = {"system_prompt": "Be brief.", "question": "2+2=", "response": "4"}
    prompt = read(tmp_path, orca, system="system_prompt", messages="question")
    assert prompt.messages == (SYSTEM, USER)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"conversations": [PERSON], "instruction": "a"}, "'messages'"),
        ({"messages": [USER, REPLY], "response": "5"}, "one response"),
        ({"conversations": [PERSON, MODEL], "response": "5"}, "one response"),
        ({"instruction": "a", "output": "b", "response": "c"}, "'response'"),
        (VERL | {"answer": "5"}, "'answer'"),
        ({"system": "Be long.", "messages": [SYSTEM, USER]}, "one system message"),
        ({"system": 7, "prompt": "a"}, "'system'"),
        ({"messages": [SYSTEM, REPLY]}, "'messages'"),
        ({"messages": [REPLY]}, "'messages'"),
        (
            {"conversations": [PERSON, {"from": "observation", "value": "x"}]},
            r"'conversations\[1\]'",
        ),
        ({"conversations": [{"from": "human"}]}, r"'conversations\[0\]'"),
        ({"conversations": []}, "'conversations'"),
        ({"instruction": "", "input": "a"}, "'instruction'"),
        ({"instruction": "a", "input": ["b"]}, "'input'"),
        ({"instruction": "a", "output": 4}, "'output'"),
        ({"instruction": "a", "history": "b"}, "'history'"),
        ({"instruction": "a", "history": [["b"]]}, "'history'"),
        ({"instruction": [USER], "input": "b"}, "'input'"),
        (VERL | {"reward_model": {"ground_truth": ["4"]}}, r"'reward_model\.ground_truth'"),
    ],
)
def test_a_row_that_can_be_read_in_two_ways_is_refused(
    row: Any, named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{named}") as caught:
        read(tmp_path, row)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# Composed and decomposed letters, a joined emoji, right-to-left, astral, a line separator, a NUL.
UNICODE = "e\u0301\u00e9 \U0001f469\u200d\U0001f680 \u0634\u0643 \U00020000 a\u2028b\u0085c\x00d"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_texts_are_kept_as_they_are(suffix: str, tmp_path: Path) -> None:
    long = f"{UNICODE}\n" * 20_000
    rows = [
        {"conversations": [{"from": "human", "value": UNICODE}, {"from": "gpt", "value": UNICODE}]},
        {"conversations": [{"from": "human", "value": long}, {"from": "gpt", "value": "\t \n"}]},
    ]
    first, second = PromptSource(saved(tmp_path, suffix, *rows)).load()
    assert (first.messages[0]["content"], first.response) == (UNICODE, UNICODE)
    assert (second.messages[0]["content"], second.response) == (long, "\t \n")
