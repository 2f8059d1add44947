"""The benchmark for a GPU runs on the CPU; what fails or is late is a row, the rest goes on."""

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from benchmarks.guarded import Measurement, MissingError, attempt
from tests.processes import run


@pytest.mark.parametrize(
    ("only", "kinds"),
    [
        ("16 tokens, padded", {"training"}),
        pytest.param("", {"training", "head", "engine"}, marks=pytest.mark.slow),
    ],
)
def test_dry_run_measures_what_is_asked_for(only: str, kinds: set[str], tmp_path: Path) -> None:
    done = run(
        "benchmarks.gpu", "--dry_run", "--budget", "3000", "--peak", "1e9", "--out", "gpu.json",
        "--only", only, cwd=tmp_path, timeout=280, check=True,
    )  # fmt: skip
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["kind"] for row in report["rows"]} == kinds
    for row in report["rows"]:
        assert row["status"] == "measured" or "trl" in row["name"], row
        assert f"| {row['name']} |" in done.stdout
    for row in report["rows"]:
        if row["kind"] == "training":
            operations = sum(row["operations"].values())
            assert row["mfu"] == pytest.approx(operations / row["step_seconds"] / 1e9)
            assert min(row["stage_seconds"].values()) > 0
            assert 0 < row["response_tokens"] < row["tokens"]
            assert (row["padding_share"] > 0) == ("3 x 16 tokens, padded" in row["name"])
        if row["kind"] == "engine":
            assert 0 < row["gap_mean"] < 0.1


def raises(error: Exception) -> Measurement:
    def run() -> NoReturn:
        raise error

    return Measurement("kind", "name", 5.0, run)


@pytest.mark.parametrize(
    ("error", "left", "status", "reason"),
    [
        (torch.cuda.OutOfMemoryError("tried to allocate"), 9.0, "failed", "out of memory"),
        (ValueError("a shape"), 9.0, "failed", "ValueError: a shape"),
        (MissingError("no TRL"), 9.0, "left out", "no TRL"),
        (ValueError("is not run"), 3.0, "left out", "3 s were left"),
    ],
)
def test_measurements_that_fail_say_why(
    error: Exception, left: float, status: str, reason: str
) -> None:
    row = attempt(raises(error), left)
    assert (row["kind"], row["name"], row["status"]) == ("kind", "name", status)
    assert row["reason"].startswith(reason)


def test_measurements_end_with_the_budget() -> None:
    def endless() -> NoReturn:
        while True:
            pass

    row = attempt(Measurement("kind", "name", 0.0, endless), 0.05)
    assert row["status"] == "failed"
    assert row["reason"].startswith("TimeoutError")
