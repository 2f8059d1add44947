"""Reports of measurements as a table and as JSON."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from opd_lightning.data.prompts import PromptSource
from opd_lightning.evaluation.base import Suite
from opd_lightning.evaluation.report import as_table
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.texts import LikelihoodSuite

PLAIN = {"length": 20.25, "truncated": 0.5}
SCORED = {**PLAIN, "score": 0.25, "score_low": 0.125, "score_high": 0.5, "pass_at_2": 0.375}
FOUND: dict[str, Any] = {
    "stage": "validate",
    "student": {"path": "lab/student", "checkpoint": "run/last.ckpt", "step": 7},
    "seed": 0,
    "suites": {
        "sums": {
            "prompts": 8,
            "samples": 2,
            **SCORED,
            "majority": 0.3,
            "domains": {"add-2": {"prompts": 5, **SCORED}, "sub-2": {"prompts": 3, **SCORED}},
        },
        "chat": {"prompts": 4, "samples": 1, **PLAIN},
        "texts": {"prompts": 3, "log_likelihood": -0.5, "perplexity": 1.6487, "kl": 0.0},
    },
}
NOWHERE = PromptSource("nowhere.jsonl")
SUITES: dict[str, Suite] = {
    "sums": EvaluationSuite(prompts=NOWHERE, samples=2),
    "chat": EvaluationSuite(prompts=NOWHERE),
    "texts": LikelihoodSuite(prompts=NOWHERE),
}


def table(found: dict[str, Any]) -> str:
    out = io.StringIO()
    as_table(found, {name: SUITES[name] for name in found["suites"]}, Console(file=out))
    return out.getvalue()


def test_a_row_for_every_suite_and_domain() -> None:
    lines = [line.split() for line in table(FOUND).splitlines()]
    assert ["validate:", "run/last.ckpt", "(step", "7)"] in lines
    heads = ["prompts", "score", "95", "%", "pass@2", "majority", "length", "truncated"]
    assert heads in lines
    scored = ["0.250", "0.125-0.500", "0.375"]
    assert ["sums,", "n=2", "8", *scored, "0.300", "20.2", "0.500"] in lines
    assert ["add-2", "5", *scored, "20.2", "0.500"] in lines
    assert ["chat", "4", "20.2", "0.500"] in lines  # not scored
    assert ["texts", "3", "1.649", "0.5000", "0.0000"] in lines


def test_what_no_suite_has_takes_no_column() -> None:
    shown = table(FOUND | {"suites": {"chat": FOUND["suites"]["chat"]}})
    assert "score" not in shown
    assert "perplexity" not in shown
