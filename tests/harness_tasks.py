"""Small tasks of lm-evaluation-harness for untrained models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROWS = [
    {"question": "2+3=", "options": ["5", "six", "51"], "gold": 0, "text": "aaa bbb"},
    {"question": "cat or dog? ", "options": ["dog", "CAT", "catalogue"], "gold": 1, "text": "a"},
    {"question": "x", "options": ["x", "y*y", "z"], "gold": 2, "text": "hello world " * 20},
    {"question": "what is 9-4", "options": ["5", "4 or 5", "no"], "gold": 0, "text": "0123456789"},
    {"question": "zzz", "options": ["a b", "b a", "aa bb cc"], "gold": 1, "text": "and so on"},
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[gold]}}",
        "generation_kwargs": {"until": ["e", "7"], "do_sample": False, "max_gen_toks": 12},
        "filter_list": [
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "^(..)"},
                                         {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}  # fmt: skip


def write_tasks(folder: Path, **changes: Any) -> str:
    """Write the tasks and their documents to a folder; `changes` apply to all tasks."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        text = yaml.safe_dump({**common, **files, **task, **changes})
        (folder / f"{name}.yaml").write_text(text)
    group = {"group": "both", "task": ["choice", "writing"],
             "aggregate_metric_list": [{"metric": "acc"}]}  # fmt: skip
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return str(folder)
