"""The limits in docs/reliability.md are those of the code."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.checkpoints import writing
from opd_lightning.commands import config_files
from opd_lightning.data import rows
from opd_lightning.models import bounded, chat, folder, source
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.serving import authentication, client, connection
from opd_lightning.teachers import RemoteTeacher
from opd_lightning.verifiers import ExactMatch, MathVerifier, RegexMatch, math, patterns

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MIB = 2**20


def default(function: Callable[..., Any], name: str) -> str:
    return f"`{name}`: {inspect.signature(function).parameters[name].default:g} s"


def limits() -> dict[str, str]:
    """The table's first two columns."""
    table = PAGE.read_text().partition("## Limits")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {first.removeprefix("| "): limit for first, limit, *_ in cells}


def test_limits_are_as_documented() -> None:
    said = limits()
    found = {
        "a JSON line": f"{rows.LINE_BYTES // MIB} MiB",
        "rendering one conversation, and encoding its text": f"{bounded.TIME_LIMIT:g} s each",
        "the text of a conversation": f"{chat.MAX_CHARACTERS:,} characters",
        "a `chat_template` file": f"{source._TEMPLATE_BYTES // MIB} MiB",
        "a file": f"{config_files.MAX_BYTES // MIB} MiB",
        "nested values": f"{config_files.MAX_DEPTH} levels",
        "values that aliases stand for": f"{config_files.MAX_VALUES:,}",
        "a JSON file": f"{folder._MAX_JSON // MIB} MiB",
        "a safetensors header": f"{folder._MAX_HEADER:,} bytes",
        "`MathVerifier`: digits of a number": f"{math.MOST_DIGITS:,}",
        "its `\\boxed` in a response": f"{math.MOST_BOXES:,}",
        "a call": default(RolloutDataModule, "engine_time_limit").replace("`", "`data.", 1),
        "connecting": f"{connection.CONNECT_SECONDS:g} s",
    }
    assert {name: said[name] for name in found} == found
    memory = said["memory while it renders"]
    assert memory.startswith(f"{bounded.MEMORY_LIMIT // 2**30} GiB,")
    nested = "its items, and brackets inside of one another, in an answer"
    assert said[nested].startswith(f"{math.MOST_ITEMS:,} and {math.MOST_OPEN}; {math.MOST_OPENED} ")
    assert f"{patterns.STEPS_HERE:,.0f} steps" in said["a regular expression"]
    body = said["the body of a request, with the key"]
    assert body.startswith(f"{authentication.BODY_BYTES // MIB} MiB")
    assert said["files of another node"].startswith(f"{writing.PATIENCE:g} s")
    for verifier in (MathVerifier, ExactMatch, RegexMatch):
        assert said["one response"] == default(verifier, "timeout_seconds")
        assert said["all responses of a step"] == default(verifier, "step_seconds")
    assert said["a response"] == default(RemoteTeacher, "timeout")
    assert f"at most {client.LONGEST_PAUSE:g} s" in PAGE.read_text()


def test_limits_of_connections_are_as_documented() -> None:
    pytest.importorskip("uvicorn", reason="comes with vLLM")
    from opd_lightning.serving import http_protocol as http

    said = limits()
    headers = f"{http.HEADER_SECONDS:g} s and {http.HEADER_BYTES // 1024} KiB"
    assert said["headers of a request"] == headers
    new = said["connections that have sent no headers yet"]
    assert new.startswith(f"{http.MOST_NEW}, and a quarter")
