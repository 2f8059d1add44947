"""Rows that cannot be used, for whatever reason, and texts that models read otherwise."""

import json
import logging
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from opd_lightning.data import prompts as prompts_module
from opd_lightning.data import rows
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.views import PromptView, Renderer
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.models.chat import render
from opd_lightning.types import Prompt
from opd_lightning.verifiers import ExactMatch
from opd_lightning.verifiers.base import checked_rewards
from tests.conftest import TinyModelDir


def write(folder: Path, *rows: Any) -> str:
    path = folder / "train.jsonl"
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: TinyModelDir) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def checks_of(tokenizer: Any, template: str | None = None) -> RowChecks:
    """Checks of a run with ExactMatch whose models read 12 tokens under a template."""
    if template is not None:
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
        tokenizer.chat_template = template
    renderer = Renderer(tokenizer, {}, {}, [1])

    def fits(prompt: Prompt, ids: list[int]) -> None:
        if template and len(ids) > 12:
            raise UserError(f"{prompt.origin}: too long")

    return RowChecks(renderer, ExactMatch(), fits)


def load(source: PromptSource, checks: RowChecks) -> list[str]:
    return [prompt.id for prompt in source.load(checks=checks)]


ROWS = [
    {"prompt": "1", "answer": "1", "id": "good"},
    {"prompt": "1", "id": "no answer"},
    {"prompt": "1" * 13, "answer": "1", "id": "long"},
    {"messages": [{"role": "system", "content": "1"}, {"role": "user", "content": "1"}],
     "answer": "1", "id": "system"},
    "not json",
    {"prompt": "2", "answer": "2", "id": "good too"},
]  # fmt: skip
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


def test_bad_rows_are_skipped_by_reason(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = PromptSource(write(tmp_path, *ROWS), on_bad_row="skip")
    checks = checks_of(tokenizer, NO_SYSTEM)
    caplog.set_level(logging.WARNING)
    prompts = source.load(checks=checks)
    assert [prompt.id for prompt in prompts] == ["good", "good too"]
    assert len(checks.ids_of(prompts)) == 2
    assert source.skipped == 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("skipped 4 of 6 rows")
    for reason in ("the verifier cannot use", "the chat template refuses", "cannot be read"):
        assert f"1 {reason}" in line
    assert "1 do not fit the models" in line


def test_what_a_source_changes_after_reading_is_rendered_and_checked(
    tokenizer: Any, tmp_path: Path
) -> None:
    class Changed(PromptSource):
        def load(self, sizes: Any = None, checks: RowChecks | None = None) -> list[Prompt]:
            one, two = super().load(sizes, checks)
            return [
                one,
                replace(two, messages=({"role": "user", "content": "34"},), privileged="56"),
                replace(two, id="added"),
            ]

    row = {"answer": "1", "privileged": "9"}
    path = write(tmp_path, {"prompt": "1", "id": "one", **row}, {"prompt": "2", "id": "two", **row})
    view = PromptView()
    renderer = Renderer(tokenizer, {}, {"teacher": view}, [1])
    checked: list[Prompt] = []
    checks = RowChecks(renderer, ExactMatch(), lambda prompt, ids: checked.append(prompt))
    prompts = Changed(path).load(checks=checks)
    ids = checks.ids_of(prompts)
    assert ids == [render(prompt, tokenizer, {}) for prompt in prompts]
    assert checked[2:] == prompts[1:]
    for prompt in prompts:
        shown = renderer.view("teacher", prompt)
        assert shown == render(prompt, tokenizer, {}, view.messages(prompt))


def test_a_limit_counts_usable_rows(tokenizer: Any, tmp_path: Path) -> None:
    source = PromptSource(write(tmp_path, *ROWS), on_bad_row="skip", limit=2)
    assert load(source, checks_of(tokenizer, NO_SYSTEM)) == ["good", "good too"]


@pytest.mark.parametrize("i", [1, 2, 3, 4])
def test_without_skipping_the_reason_is_told(i: int, tokenizer: Any, tmp_path: Path) -> None:
    source = PromptSource(write(tmp_path, ROWS[0], ROWS[i]))
    with pytest.raises(UserError, match=r"train\.jsonl:2: "):
        source.load(checks=checks_of(tokenizer, NO_SYSTEM))


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_rows_are_read_together(
    batch: int, limit: int | None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if one by one: in order, with the first problem, and none of what is behind the limit."""
    monkeypatch.setattr(prompts_module, "BATCH", batch)
    file = write(tmp_path, *ROWS)
    source = PromptSource(file, on_bad_row="skip", limit=limit)
    good = ["good", "good too"]
    assert load(source, checks_of(tokenizer, NO_SYSTEM)) == good[:limit]
    assert source.skipped == (0 if limit == 1 else 4)
    source = PromptSource(file, limit=limit)
    if limit == 1:
        assert load(source, checks_of(tokenizer, NO_SYSTEM)) == good[:1]
    else:
        with pytest.raises(UserError, match=r"train\.jsonl:2: "):
            load(source, checks_of(tokenizer, NO_SYSTEM))


def test_rows_of_other_domains_are_not_checked(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1", "answer": "1", "id": "good", "domain": "a"},
        {"prompt": "1", "id": "no answer", "domain": "b"},
    ]
    source = PromptSource(write(tmp_path, *rows), domains=["a"])
    assert load(source, checks_of(tokenizer)) == ["good"]


# Texts ------------------------------------------------------------------------------------


CONTROL = [
    {"prompt": "1", "answer": "1", "id": "a"},
    {"prompt": "1<eos>2", "answer": "1", "id": "b"},
    {"prompt": "2", "answer": "1", "id": "c", "response": "<eos>"},
]


def test_control_tokens_in_texts(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, *CONTROL)
    caplog.set_level(logging.WARNING)
    assert load(PromptSource(path), checks_of(tokenizer)) == ["a", "b", "c"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 of 3 rows")
    assert line.endswith(f"first: {path}:2: '<eos>'")
    with pytest.raises(UserError, match=r":2: must not hold control tokens as text, got '<eos>'"):
        load(PromptSource(path, on_control_tokens="error"), checks_of(tokenizer))
    skipping = PromptSource(path, on_control_tokens="error", on_bad_row="skip")
    assert load(skipping, checks_of(tokenizer)) == ["a"]
    caplog.clear()
    checks = checks_of(tokenizer)
    escaped = PromptSource(path, on_control_tokens="escape").load(checks=checks)
    assert escaped[1].messages[0]["content"] == "1< eos>2"
    assert escaped[2].response == "< eos>"
    end = tokenizer.eos_token_id
    assert [ids.count(end) for ids in checks.ids_of(escaped)] == [1, 1, 1]  # the template's own
    assert not [r for r in caplog.records if "a control token" in r.getMessage()]


def test_characters_that_the_tokenizer_lacks(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, ROWS[0], {"prompt": "é雪 1", "answer": "1"})
    caplog.set_level(logging.WARNING)
    PromptSource(path).load(checks=checks_of(tokenizer))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the tokenizer lacks 2 characters")
    assert line.endswith(f"é雪; first: {path}:2")


def test_messages_with_more_than_role_and_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{"role": "user", "content": "1"}]
    rows = [
        {"messages": chat, "id": "a"},
        {"messages": [chat[0] | {"name": "x", "tool_calls": None}], "id": "b"},
    ]
    caplog.set_level(logging.WARNING)
    assert [prompt.id for prompt in PromptSource(write(tmp_path, *rows)).load()] == ["a", "b"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("messages of 1 of 2 rows")
    assert "'name'" in line
    assert line.endswith("train.jsonl:2")


def test_messages_beside_a_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": "1", "prompt": "2"}
    path = write(tmp_path, {"prompt": "3"}, row)
    caplog.set_level(logging.WARNING)
    prompts = PromptSource(path).load()
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["3", "1"]
    assert "1 of 2 rows" in caplog.text
    caplog.clear()
    PromptSource(path, columns={"messages": "prompt"}).load()
    assert not caplog.records


def test_a_template_that_leaves_text_out(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    last = checks_of(tokenizer, "{{ messages[0].content }}")
    source = PromptSource(write(tmp_path, *ROWS[:1], ROWS[3]))
    with pytest.raises(UserError, match=r":2: the student's chat template leaves out the last"):
        source.load(checks=last)
    caplog.clear()
    system = checks_of(tokenizer, "{{ messages[-1].content }}")
    assert load(source, system) == ["good", "system"]
    assert caplog.text.count("leaves out the system message") == 1


# Files ------------------------------------------------------------------------------------


def test_deep_and_long_values(tmp_path: Path) -> None:
    deep = '{"prompt": "1", "other": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = write(tmp_path, {"prompt": "1", "answer": 10**400}, deep, {"prompt": "2"})
    with pytest.raises(UserError, match=r":2: is nested too deeply to be read"):
        PromptSource(path).load()
    first, second = PromptSource(path, on_bad_row="skip").load()
    assert first.answer == str(10**400)
    assert second.messages[0]["content"] == "2"


def test_lines_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LINE_BYTES", 50)
    fits = json.dumps({"prompt": "1", "other": "x" * 21})  # with its end, 50 bytes
    path = write(tmp_path, fits, fits.replace("1", "12"), {"prompt": "x" * 200}, {"prompt": "3"})
    with pytest.raises(UserError, match=r":2: must have at most 50 bytes, got 51"):
        PromptSource(path).load()
    found = PromptSource(path, on_bad_row="skip").load()
    assert [prompt.messages[0]["content"] for prompt in found] == ["1", "3"]
    # A file that has grown is read as far as it was.
    assert len(PromptSource(path).load(lambda source: 100)) == 2


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"prompt": f"question {i}"} for i in range(5000)])
    parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[1000:3000] = b"\xff" * 2000
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        PromptSource(str(path)).load()


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    words = pa.array([b"1", b"\xff", b"3"]).view(pa.utf8())
    parquet.write_table(pa.table({"prompt": words}), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: must be UTF-8"):
        PromptSource(str(path)).load()
    prompts = PromptSource(str(path), on_bad_row="skip").load()
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["1", "3"]


def test_damaged_offsets_in_a_folder(tmp_path: Path) -> None:
    """They would read memory of others, or end the process."""
    datasets.Dataset.from_list([{"prompt": "1"}] * 3).save_to_disk(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    ends = struct.pack("<4i", 0, 1, 2, 3)
    damaged = file.read_bytes().replace(ends, struct.pack("<4i", 0, 1, 2**30, 3))
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read .*saved"):
        PromptSource(str(tmp_path / "saved")).load()


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff\xfe"])
def test_damaged_folders(file: str, content: bytes | None, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "1"}] * 3).save_to_disk(str(tmp_path / "saved"))
    damaged = tmp_path / "saved" / file
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    source = PromptSource(str(tmp_path / "saved"))
    if file == "dataset_info.json" and content == b"{}":  # no warning
        assert len(source.load()) == 3
        return
    with pytest.raises(UserError, match=r"\A.*saved.*\Z"):
        source.load()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"splits": []}', b'{"splits": 1}', b"[1]"])
def test_a_damaged_list_of_splits(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_bytes(content)
    with pytest.raises(UserError, match="as a list of splits"):
        PromptSource(str(tmp_path)).load()


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"prompt": "1"})

    def denied(path: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="Permission denied"):
        PromptSource(path).load()


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"prompt": "1"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(PromptSource("~/train.jsonl").load()) == 1


# Rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [4.03, -0.1, float("inf")])
def test_rewards_outside_their_range(reward: float) -> None:
    prompt = Prompt(id="a", messages=({"role": "user", "content": "1"},), origin="x.jsonl:1")
    with pytest.raises(RunStoppedError, match=r"x\.jsonl:1: ExactMatch gave"):
        checked_rewards(ExactMatch(), [prompt] * 2, [1.0, reward])
    with pytest.raises(RunStoppedError, match="got 1 rewards for 2 responses"):
        checked_rewards(ExactMatch(), [prompt] * 2, [1.0])
    nan = float("nan")  # no score
    assert checked_rewards(ExactMatch(), [prompt] * 3, [0, 1, nan])[:2] == [0, 1]


@pytest.mark.parametrize("reward", [None, "1"])
def test_rewards_that_are_no_numbers(reward: Any) -> None:
    prompt = Prompt(id="a", messages=({"role": "user", "content": "1"},), origin="x.jsonl:1")
    said = rf"x\.jsonl:1: ExactMatch gave a response the reward {reward!r}, expected a number"
    with pytest.raises(RunStoppedError, match=said):
        checked_rewards(ExactMatch(), [prompt], [reward])


def test_a_view_that_the_template_leaves_out(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, {}, {"privileged": PromptView()}, [1])
    prompt = Prompt(id="a", messages=({"role": "user", "content": "1"},), privileged="2")
    assert renderer.view("privileged", prompt) != renderer.plain(prompt)
