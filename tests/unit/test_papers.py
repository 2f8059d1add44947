"""configs/papers: every run is estimated on models of the real shapes, as docs/papers.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.cli import main
from tests.described import SHAPES, WEIGHTS, describe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text()
# Sizes by the folder or hub name of a configuration. The hybrid model of EDGE-OPD is estimated as
# one of attention layers of its size.
MODELS = {
    "Qwen/Qwen3-1.7B": "1.7B",
    "Qwen/Qwen3-4B": "4B",
    "Qwen/Qwen3-32B": "32B",
    "runs/sft/student": "8B",
    "teachers/qwen3-4b-rl-math": "4B",
    "teachers/qwen3-4b-rl-code": "4B",
    "teachers/qwen3-1.7b-grpo": "1.7B",
    "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16": "4B",
}
# Weights of the student and of each teacher in the trainer's processes.
USED = {
    "opd": ["8B", "32B"],
    "exopd": ["1.7B", "4B", "1.7B"],
    "exopd_merge": ["4B", "4B", "4B", "4B"],
    "sg_opd": ["1.7B", "4B", "1.7B"],
    "edge_opd": ["4B", "4B"],
    "many_faces": ["1.7B", "1.7B"],
}
GIB = 2**30


def row_of(name: str, found: dict[str, dict[str, float]], options: str) -> str:
    """Return the row of the page's table."""
    memory, time = found["memory (estimate)"], found["time (assumed speeds)"]
    tokens = found["tokens (assumed)"]
    state = sum(memory[f"{part}_bytes"] for part in ("weights", "gradients", "optimizer"))
    cells = [
        f"`{name}.yaml`",
        options,
        f"{tokens['rollouts']:,.0f}",
        f"{(tokens['prompt_tokens'] + tokens['response_tokens']) / 1e6:.1f}",
        f"{state / GIB:.1f}",
        f"{memory['teachers_bytes'] / GIB:.1f}",
        f"{memory['total_bytes'] / GIB:.0f}",
        f"{time['write_seconds']:.0f}",
        f"{time['student_seconds']:.0f}",
        f"{time['teachers_seconds']:.0f}",
        f"{time['hours']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


ROWS = re.findall(r"^\| `(\w+)\.yaml` \| ([^|]*) \|.*\|$", PAGE, re.MULTILINE)


def test_every_recipe_is_on_the_page() -> None:
    shipped = {path.stem for path in (ROOT / "configs" / "papers").glob("*.yaml")}
    assert shipped == {name for name, _ in ROWS} == USED.keys()


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_the_page_says_what_the_command_prints(
    name: str,
    options: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, size in MODELS.items():
        describe(tmp_path / path, SHAPES[size])
    config = str(ROOT / "configs" / "papers" / f"{name}.yaml")
    words = options.replace("`", "").split()
    main(["estimate", "--config", config, "--json", "--trainer.logger=false", *words])
    printed: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert printed["ready"]
    assert {finding["level"] for finding in printed["findings"]} == {"ok"}
    found = {finding["subject"]: finding["values"] for finding in printed["findings"]}
    student, *teachers = found["models"].values()
    published, *others = (WEIGHTS[size] for size in USED[name])
    assert teachers == others
    assert student == pytest.approx(published, rel=0.05 if name == "opd" else 0)  # an adapter
    assert row_of(name, found, options) in PAGE
