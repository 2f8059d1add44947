"""Prompt files: what is read, and one line about everything that cannot be."""

import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2="}]


def write(folder: Path, *rows: Any) -> str:
    """A .jsonl file; bytes and texts are written as they are."""
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    raw = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    path = folder / "train.jsonl"
    path.write_bytes(raw + b"\n")
    return str(path)


def refusal(source: PromptSource) -> str:
    """The message of the UserError that `load` raises."""
    with pytest.raises(UserError) as caught:
        source.load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    row = {
        "messages": CHAT,
        "answer": 4,
        "response": "It is 4.",
        "privileged": "Count on your fingers.",
        "domain": "sums",
        "id": "sum-1",
        "difficulty": 0.3,
    }
    path = write(tmp_path, row)
    (prompt,) = PromptSource(path).load()
    assert prompt.messages == tuple(CHAT)
    assert prompt.answer == "4"
    assert prompt.response == "It is 4."
    assert prompt.privileged == "Count on your fingers."
    assert prompt.domain == "sums"
    assert prompt.id == "sum-1"
    assert prompt.origin == f"{path}:1"


def test_a_response_may_be_ids(tmp_path: Path) -> None:
    first = {"prompt": "2+2=", "response": "4", "response_ids": [7, 0, 2]}
    (one, other) = PromptSource(write(tmp_path, first, {"prompt": "3+3="})).load()
    assert one.response_ids == (7, 0, 2)
    assert one.response == "4"
    assert other.response_ids is None


def test_domains_are_chosen_before_the_limit(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "domain": "hard" if i % 2 else "easy"} for i in range(6)]
    path = write(tmp_path, *rows)
    chosen = PromptSource(path, domains=["hard"], limit=2).load()
    assert [prompt.origin for prompt in chosen] == [f"{path}:2", f"{path}:4"]
    assert len(PromptSource(path, domains=["hard", "easy"]).load()) == 6
    message = refusal(PromptSource(path, domains=["hard", "harder"]))
    assert "is of 'harder', got easy, hard; correct the name" in message


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([], "'response_ids' must be a list of token ids, got []"),
        ("7 2", "'response_ids' must be a list of token ids, got '7 2'"),
        ([7, -1], "'response_ids[1]' must be a token id, got -1"),
        ([7, 2.0], "'response_ids[1]' must be a token id, got 2.0"),
        ([True], "'response_ids[0]' must be a token id, got True"),
    ],
)
def test_bad_ids_are_named(tmp_path: Path, ids: Any, complaint: str) -> None:
    path = write(tmp_path, {"prompt": "2+2=", "response_ids": ids})
    assert f"{path}:1: {complaint}" in refusal(PromptSource(path))


def test_a_bare_row_gets_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "", {"messages": "2+2="}, "  ", {"prompt": "3+3="}, {"prompt": CHAT})
    first, second, third = PromptSource(path).load()
    assert first.messages == ({"role": "user", "content": "2+2="},)
    assert (first.id, first.domain, first.origin) == ("train:2", "default", f"{path}:2")
    assert (first.answer, first.response, first.privileged) == (None, None, None)
    assert second.messages == ({"role": "user", "content": "3+3="},)
    assert second.id == "train:4"
    assert third.messages == tuple(CHAT)


def test_columns_rename_fields(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "2+2=", "gold": "4", "prompt": "not this", "answer": "5"})
    columns = {"messages": "question", "answer": "gold"}
    (prompt,) = PromptSource(path, columns=columns).load()
    assert prompt.messages[0]["content"] == "2+2="
    assert prompt.answer == "4"


def test_limit_keeps_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": str(n)} for n in range(5)), "not json")
    assert [p.messages[0]["content"] for p in PromptSource(path, limit=2).load()] == ["0", "1"]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')
    assert [p.messages[0]["content"] for p in PromptSource(path).load()] == ["a", "b"]


def test_parquet_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    rows = [{"messages": CHAT, "answer": 4, "id": None}, {"messages": CHAT, "answer": None}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    first, second = PromptSource(str(path)).load()
    assert first.messages == tuple(CHAT)
    assert (first.answer, first.id, first.origin) == ("4", "train:1", f"{path}:1")
    assert (second.answer, second.id) == (None, "train:2")


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    rows = [{"prompt": f"{n}"} for n in range(9)] + [{"prompt": ""}]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    assert refusal(PromptSource(str(path))).startswith(f"{path}:10: 'prompt' must be")


@pytest.mark.parametrize("format_", [None, "numpy"])
def test_saved_dataset_round_trip(tmp_path: Path, format_: str | None) -> None:
    path = tmp_path / "saved"
    rows = [{"messages": CHAT, "answer": 4.5}, {"messages": CHAT, "answer": 5.0}]
    datasets.Dataset.from_list(rows).with_format(format_).save_to_disk(str(path))
    first, second = PromptSource(str(path)).load()
    assert first.messages == tuple(CHAT)
    assert (first.answer, first.id, first.origin) == ("4.5", "saved:1", f"{path}:1")
    assert second.id == "saved:2"


def test_a_folder_of_splits_is_refused(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "all"))
    message = refusal(PromptSource(str(tmp_path / "all")))
    assert "holds several splits (train, test)" in message
    assert f"give the folder of one, such as '{tmp_path / 'all' / 'train'}'" in message
    assert len(PromptSource(str(tmp_path / "all" / "train")).load()) == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{'prompt': 1}", "must be one JSON object per line, got b\"{'prompt': 1}\\n\" (Expecting"),
        ("[1, 2]", "must be one JSON object per line, got [1, 2]"),
        (b'{"prompt": "caf\xe9"}', "must be UTF-8, got a bad byte at position 15"),
        ({}, "'messages' must be a chat or a text that is not empty, got only the columns"),
        ({"text": 1, "b": 2}, "'messages' must be a chat or a text that is not empty, got only"),
        ({"messages": []}, "'messages' must be a chat or a text that is not empty, got []"),
        ({"messages": "  "}, "'messages' must be a chat or a text that is not empty, got '  '"),
        ({"prompt": 7}, "'prompt' must be a chat or a text that is not empty, got 7"),
        ({"messages": ["hi"]}, "'messages[0]' must have a role and a text as content, got 'hi'"),
        (
            {"messages": [*CHAT, {"role": "user"}]},
            "'messages[2]' must have a role and a text as content, got {'role': 'user'}",
        ),
        (
            {"messages": [*CHAT, {"role": "tool", "content": "x"}]},
            "'messages[2]' is a turn of a tool (role 'tool'), which is not supported: expected",
        ),
        (
            {"conversations": [{"from": "observation", "value": "x"}]},
            "'conversations[0]' is a turn of a tool (role 'observation')",
        ),
        (
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
                ]
            },
            "'messages[1]' calls a function (tool_calls)",
        ),
        (
            {"messages": [{"role": "critic", "content": "x"}]},
            "'messages[0]' must have a role of system, user, assistant, got 'critic'",
        ),
        (
            {"messages": [{"content": "x"}]},
            "'messages[0]' must have a role of system, user, assistant, got nothing",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "4"}]},
            "'messages' must have a user's turn before the assistant's last, got none",
        ),
        ({"prompt": "a", "answer": True}, "'answer' must be a text or a finite number, got True"),
        ('{"prompt": "a", "answer": NaN}', "'answer' must be a text or a finite number, got nan"),
        ({"prompt": "a", "answer": ["4"]}, "'answer' must be a text or a finite number, got ['4']"),
        ({"prompt": "a", "response": 4}, "'response' must be a text, got 4"),
        ({"prompt": "a", "privileged": {"a": 1}}, "'privileged' must be a text, got {'a': 1}"),
        ({"prompt": "a\ud83d"}, "'prompt[0]' must be valid Unicode, got half a surrogate pair"),
        (
            {"prompt": "a", "answer": "\ud83d"},
            "'answer' must be valid Unicode, got half a surrogate pair",
        ),
        (
            '{"prompt": "b", "id": 1, "id": 2}',
            """must be one JSON object per line, got b'{"prompt": "b", "id": 1, "id": 2}\\n' """
            "(the key 'id' is set twice)",
        ),
        ({"prompt": "b", "id": "x"}, "'id' must be unique, got 'x' as in row 1"),
        ({"prompt": "b", "domain": 3}, "'domain' must be a text, got 3"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path: Path, row: Any, problem: str) -> None:
    path = write(tmp_path, {"prompt": "a", "id": "x"}, "", row, {"prompt": "c"})
    message = refusal(PromptSource(path))
    assert message.startswith(f"{path}:3: {problem}")
    assert message.endswith("; fix the row or set on_bad_row: skip")

    source = PromptSource(path, on_bad_row="skip")
    assert [prompt.origin for prompt in source.load()] == [f"{path}:1", f"{path}:4"]
    assert source.skipped == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "7"),
        (7.5, "7.5"),
        (18.0, "18.0"),
        (1e-05, "0.00001"),
        (-2.5e-07, "-0.00000025"),
        (1e16, "10000000000000000"),
        (10**20, "1" + "0" * 20),
    ],
)
def test_numbers_as_answers_have_no_exponent(tmp_path: Path, number: float, text: str) -> None:
    """Verifiers of formulas read the e as the base of the natural logarithm."""
    (prompt,) = PromptSource(write(tmp_path, {"prompt": "a", "answer": number})).load()
    assert prompt.answer == text


def test_decimals_of_parquet_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "answer": [Decimal("0.0000001")]}), path)
    assert PromptSource(str(path)).load()[0].answer == "0.0000001"


def test_a_long_bad_value_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "answer": ["long"] * 10_000})
    assert len(refusal(PromptSource(path))) < 250 + len(path)


def test_skipped_rows_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"prompt": "a"}, {"prompt": 1}, {"prompt": "b"}, "nonsense")
    source = PromptSource(path, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        source.load()
        source.load()
    assert source.skipped == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second
    assert first.startswith(
        f"skipped 2 of 4 rows of {path} (2 cannot be read); first: {path}:2: 'prompt'"
    )
    assert "\n" not in first


@pytest.mark.parametrize(("content", "found"), [(b"", "0 rows"), (b"\n \n", "0 rows")])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    message = refusal(PromptSource(str(path)))
    assert message == f"no usable prompt in {str(path)!r}: {found}; give a file with prompts"


def test_nothing_left_after_skipping_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": 1}, {"prompt": 2})
    message = refusal(PromptSource(path, on_bad_row="skip"))
    assert f"all 2 rows are bad; first: {path}:1: 'prompt' must be" in message


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    readable = "give a .jsonl or .parquet file or a folder written by Dataset.save_to_disk"
    missing = str(tmp_path / "absent.jsonl")
    assert refusal(PromptSource(missing)) == f"no prompt file at {missing!r}; {readable}"

    table = tmp_path / "train.csv"
    table.write_text("prompt\na\n")
    message = refusal(PromptSource(str(table)))
    assert message == f"cannot read {str(table)!r}: unknown suffix '.csv'; {readable}"

    message = refusal(PromptSource(str(tmp_path)))
    assert f"{str(tmp_path)!r} is not a saved dataset: it has no state.json; {readable}" == message

    broken = tmp_path / "train.parquet"
    broken.write_text("this is not parquet")
    message = refusal(PromptSource(str(broken)))
    assert message.startswith(f"cannot read {str(broken)!r} as parquet: ")
    assert message.endswith(readable)


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "gold": "1"}, {"prompt": "b"})
    message = refusal(PromptSource(path, columns={"answer": "golf"}))
    assert f"columns: no row read from {path!r} has a column 'golf' for 'answer'" in message
    assert len(PromptSource(path, columns={"answer": "gold"}).load()) == 2
    message = refusal(PromptSource(path, columns={"messages": "question"}))
    assert "'question' must be a chat or a text that is not empty, got only the columns" in message


def test_wrong_settings_are_refused_at_construction() -> None:
    with pytest.raises(UserError) as caught:
        PromptSource("x.jsonl", columns={"question": "messages"})
    assert str(caught.value) == (
        "columns: unknown field 'question'; the fields are messages, system, answer, response, "
        "privileged, domain, id, response_ids, input, history, written as field: column"
    )
    with pytest.raises(UserError, match=r"^limit must be at least 1, got 0; leave it out"):
        PromptSource("x.jsonl", limit=0)
