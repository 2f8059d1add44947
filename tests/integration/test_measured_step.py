"""The formulas of `opd check` against what real processes hold and send, to the byte."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.measured_step import MALLOC, QUIET
from tests.processes import run_ranks

# Rows of the adapters do not divide by the number of processes: one holds more than the other.
TINY = "--hidden 128 --layers 2 --vocabulary 511 --rows 2 --tokens 8 --steps 2"


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        pytest.param("ddp", "", marks=pytest.mark.slow),
        ("fsdp2", "--precision bf16-mixed --checkpointing --lora"),
        pytest.param("fsdp2", "--lora --adapter_off", marks=pytest.mark.slow),
        pytest.param("fsdp2", "--precision bf16-mixed", marks=pytest.mark.slow),
        pytest.param("hsdp", "", marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2", "fsdp2 read by itself", "fsdp2 of all weights", "hsdp in groups of two"],
)
def test_processes_hold_and_send_what_is_predicted(
    strategy: str, more: str, tmp_path: Path
) -> None:
    ranks = 4 if strategy == "hsdp" else 2
    words = ["--strategy", strategy, "--ranks", str(ranks), "--out", "found.json"]
    run_ranks(
        "benchmarks.measured_step", *words, *TINY.split(), *more.split(),
        count=ranks, timeout=300, cwd=tmp_path, env={**os.environ, **QUIET, **MALLOC},
    )  # fmt: skip
    every = json.loads((tmp_path / "found.json").read_text())
    predicted = every[0]["predicted"]
    assert len(every) == ranks
    for name, size in predicted["held"].items():
        assert size == max(found["held"][name] for found in every)
    half = 1 if strategy == "ddp" else 2  # the embedding has an odd row
    uneven = 0 if strategy == "ddp" else 4 * 128 * 3
    for found in every:
        assert found["held"]["weights"] >= predicted["weights"] // half - uneven
    for name, sent in predicted["sent"].items():
        # Of two each sends half of what is gathered or scattered, and all of what is added up.
        share = 1 if name == "all_reduce" else 0.5
        assert sent == pytest.approx(every[0]["sent"].get(name, 0) * share, rel=0.01), name
    assert max(predicted["sent"].values()) > 1e5
