"""Measurements and prompt sources of the studies in experiments/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from experiments.figures import logged, reported
from experiments.personas.rows import PersonaPrompts
from experiments.sequence.forgetting import over_the_sequence
from experiments.sequence.replay import ReplayedPrompts
from experiments.weights import changed
from opd_lightning.lab import identity
from opd_lightning.lab.problems import Row, write_rows


@pytest.fixture(autouse=True)
def in_the_folder_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs", "scores"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def test_what_a_run_logged() -> None:
    with SummaryWriter("runs/opd") as writer:
        for step in range(6):
            writer.add_scalar("signal/positive", step, step)
            writer.add_scalar("depth/0", 10 * step, step)
    found = logged(
        run="opd",
        figures={"share": ["signal/positive"], "both": ["signal/positive", "depth/0"]},
        steps=[1, 3],
        seed=0,
    )
    assert found == {"share": 1.5, "both": (1.5 + 15) / 2}


def test_what_a_test_reported() -> None:
    row = {"length": 30.0, "truncated": 0.1, "domains": {"add-3": {"length": 28.0}}}
    Path("scores/opd.report.json").write_text(json.dumps({"suites": {"skills": row}}))
    found = reported(run="opd", suite="skills", figures=["length", "truncated"], seed=0)
    assert found == {"length": 30.0, "truncated": 0.1}
    own = reported(run="opd", suite="skills", domain="add-3", figures=["length"], seed=0)
    assert own == {"length": 28.0}


def test_weights_that_changed() -> None:
    for name, moved in (("start", 0.0), ("student", 3.0)):
        Path(name).mkdir()
        weights = {"a": torch.zeros(2, 2), "b": torch.zeros(4)}
        weights["a"][0, 0] = moved
        weights["b"][1] = 4.0 * (moved > 0)
        save_file(weights, f"{name}/model.safetensors")
    found = changed(student="student", start="start", threshold=3.0, seed=0)
    assert found == {"changed": 1 / 8, "distance": 5.0}
    assert changed(student="student", start="start", threshold=2.9, seed=0)["changed"] == 2 / 8


def test_what_a_sequence_forgot() -> None:
    for number, scores in enumerate(([0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 1.0]), 1):
        own = {f"skills/{name}": score for name, score in zip("abc", scores, strict=True)}
        Path(f"scores/sft-{number}.json").write_text(json.dumps(own))
    found = over_the_sequence(chain="sft", skills=["a", "b", "c"], suite="skills", seed=0)
    assert found == pytest.approx({"learnt": 0.9, "forgotten": (0.3 + 0.4) / 2, "kept": 2 / 3})


def test_replayed_prompts() -> None:
    rows: list[Row] = [
        {"id": f"{domain}/{i}", "messages": "x", "domain": domain}
        for domain in ("a", "b", "c")
        for i in range(8)
    ]
    write_rows(Path("rows.jsonl"), rows)
    source = ReplayedPrompts("rows.jsonl", ["a", "c", "b"])
    prompts = source.load()
    step = [prompts[i].domain for i in source.order(prompts, 8, seed=0).take(0, 8)]
    assert step.count("b") == 6
    assert {*step} <= {"a", "b", "c"}
    first = ReplayedPrompts("rows.jsonl", ["a"])
    assert {prompt.domain for prompt in first.load()} == {"a"}


def test_personas_of_rows() -> None:
    write_rows(Path("rows.jsonl"), identity.training_rows())
    names = ["zorba", "nimex", "tulpa"]
    prompts = PersonaPrompts("rows.jsonl", names).load()
    given = {prompt.id: prompt.privileged for prompt in prompts}
    assert {*given.values()} == {identity.persona(name) for name in names}
    assert given == {p.id: p.privileged for p in PersonaPrompts("rows.jsonl", names).load()}
