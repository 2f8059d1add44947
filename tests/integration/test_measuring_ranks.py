"""Several processes measure, plot and fail like one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main
from tests.integration.measuring_ranks import CONFIGS, LAYOUTS, PROMPTS, STEPS
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(900)  # who comes first starts the processes

SCRIPT = "tests.integration.measuring_ranks"
MANY = ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)]
# Commands that one start of a layout's processes runs; those of the first are in quick tests, but
# for fsdp2.
STARTS: dict[str, list[tuple[str, ...]]] = {
    "one": [("fit", "validate"), ("test",)],
    "ddp": [("fit", "validate", "damaged"), ("test",)],
    "fsdp2": [("fit", "validate", "test", "prompts", "damaged", "none")],
}
QUESTIONS = [(i, domain) for i in range(11) for domain in ("sums", "products", "others")]


def suites() -> dict[str, Any]:
    """Uneven everywhere: of one prompt, of one more than batches hold, and domains of one."""
    few = {"path": "questions.jsonl", "limit": 7}
    return {
        "data": {
            "validation": {
                "all": {"prompts": {"path": "questions.jsonl"}, "samples": 3, "batch_size": 8},
                "few": {"prompts": few, "samples": 2, "pass_at": [1, 2], "batch_size": 1},
                "lone": {"prompts": {"path": "questions.jsonl", "limit": 1}},
            },
            "test": {"few": {"prompts": few, "samples": 4}},
            "texts": {
                "worked": {
                    "prompts": {"path": "lab/arithmetic/demonstrations.jsonl", "limit": 5},
                    "batch_size": 2,
                }
            },
            "verifier": {
                "class_path": "opd_lightning.verifiers.ExactMatch",
                "init_args": {"pattern": "[0-9]"},
            },
            "sampling": {"max_new_tokens": 8},
            "prompts_per_step": PROMPTS,
        },
        "trainer": {"max_steps": STEPS, "enable_progress_bar": False},
    }


class Said:
    """Starts the script for commands that nobody has asked for yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._said: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, layout: str, name: str) -> list[Any]:
        """Of every process: the command's exit code and what it wrote."""
        if name not in self._said.get(layout, [{}])[0]:
            if layout != "one":
                self("one", "fit")
            (names,) = (names for names in STARTS[layout] if name in names)
            count = 1 if layout == "one" else 2
            run_ranks(SCRIPT, layout, *names, count=count, cwd=self.folder, timeout=400)
            for rank, said in enumerate(self._said.setdefault(layout, [{} for _ in range(count)])):
                said |= json.loads((self.folder / f"{layout}-{rank}.json").read_text())
        return [said[name] for said in self._said[layout]]

    def measured(self, layout: str, name: str) -> dict[str, Any]:
        """What the first process found and printed; the others print nothing."""
        first, *others = self(layout, name)
        assert [one["code"] for one in (first, *others)] == [0] * (1 + len(others)), first
        assert not any(one["out"] for one in others)
        file = self.folder / f"{layout}-test.json"
        found: dict[str, Any] = json.loads(file.read_text() if name == "test" else first["out"])
        return found


@pytest.fixture(scope="module")
def said(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp("measuring_ranks")
    (folder / "lab").symlink_to(untrained_lab / "lab")
    rows = [
        {"messages": f"{i}+{i % 4}", "answer": str(i % 3), "domain": domain}
        for i, domain in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suites.yaml").write_text(yaml.safe_dump(suites()))
    return Said(folder)


def numbers(found: Any, name: str = "") -> dict[str, float | str | None]:
    """All leaves of nested objects, by their path."""
    if not isinstance(found, dict):
        return {name: found}
    leaves = [numbers(value, f"{name}/{key}") for key, value in found.items()]
    return {path: value for part in leaves for path, value in part.items()}


@pytest.mark.parametrize("layout", MANY)
@pytest.mark.parametrize("stage", ["validate", pytest.param("test", marks=pytest.mark.slow)])
def test_many_measure_what_one_does(said: Said, stage: str, layout: str) -> None:
    alone, together = (numbers(said.measured(name, stage)) for name in ("one", layout))
    assert together.keys() == alone.keys()
    assert together == {
        name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        for name, value in alone.items()
    }
    assert alone["/student/step"] == STEPS
    assert {"/suites/few/domains/sums/pass_at_2", "/suites/worked/kl"} <= alone.keys()
    suite = "/suites/few" if stage == "test" else "/suites/all"
    score, passed = alone[f"{suite}/score"], alone[f"{suite}/pass_at_2"]
    assert isinstance(score, float)
    assert isinstance(passed, float)
    assert 0 < score < passed < 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", MANY)
def test_a_table_is_printed_once(said: Said, layout: str) -> None:
    first, *others = said(layout, "test")
    assert not any(one["out"] for one in others)
    assert first["out"].count("few, n=4") == 1
    assert first["out"] == said("one", "test")[0]["out"]


LINES = {
    "prompts": "no prompt file at 'nowhere.jsonl'",
    "damaged": "'suites.yaml' is damaged or no checkpoint",
    "none": "got 'last', but no whole checkpoint is in 'runs/nobody/checkpoints'",
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("ddp", "damaged"),
        *(pytest.param("fsdp2", name, marks=pytest.mark.slow) for name in LINES),
    ],
)
def test_mistakes_are_one_line(said: Said, layout: str, name: str) -> None:
    everybody, line = said(layout, name), LINES[name]
    assert {one["code"] for one in everybody} == {2}
    lines = [x for one in everybody for x in one["err"].splitlines() if "error:" in x]
    assert len(lines) == 1, lines
    assert line in lines[0]


def test_a_missing_checkpoint_is_one_line_before_others_are_started(
    said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(said.folder)
    with pytest.raises(SystemExit) as ended:
        main(
            ["validate", "--config", str(CONFIGS / "lab" / "opd.yaml"), *LAYOUTS["ddp"],
             "--ckpt_path=nowhere.ckpt"]
        )  # fmt: skip
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "opd: " in x]
    assert "no checkpoint at 'nowhere.ckpt'" in line
    assert "'last'" in line


def events(said: Said, layout: str) -> EventAccumulator:
    said(layout, "fit")
    found = EventAccumulator(str(said.folder / "runs" / layout), {"histograms": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("layout", MANY)
def test_many_plot_what_one_does(said: Said, layout: str) -> None:
    alone, together = events(said, "one"), events(said, layout)
    assert together.Tags() == alone.Tags()
    assert "collapse/out_of_band" in alone.Tags()["scalars"]
    mine, theirs = (found.Histograms("signal/log_ratio") for found in (together, alone))
    assert [entry.step for entry in mine] == [entry.step for entry in theirs] == [0, 1]
    for one, other in zip(mine, theirs, strict=True):
        counts, expected = one.histogram_value, other.histogram_value
        assert counts.bucket == expected.bucket
        assert len([count for count in counts.bucket if count]) > 10
        assert counts.num == expected.num
        assert counts.sum == pytest.approx(expected.sum, abs=1e-3)
        assert counts.sum_squares == pytest.approx(expected.sum_squares, abs=1e-3)
    assert [entry.step for entry in together.Images("signal/by_depth")] == [0, 1]


@pytest.mark.parametrize("layout", ["one", *MANY])
def test_rollouts_are_shown_once(said: Said, layout: str) -> None:
    run = said.folder / "runs" / layout
    assert said(layout, "fit")[0]["code"] == 0
    steps = [json.loads(line)["step"] for line in (run / "rollouts.jsonl").open()]
    assert steps == [0] * 4 + [1] * 4
    assert len(list(run.glob("events*"))) == 1
    texts = events(said, layout).Tensors("rollouts/text_summary")
    assert [entry.step for entry in texts] == [0, 1]


@pytest.mark.slow
def test_the_processes_of_a_mistake_all_end(said: Said) -> None:
    said("one", "fit")
    common = ["--config", str(CONFIGS / "lab" / "opd.yaml"), "--config", "suites.yaml"]
    missing = "--data.texts.worked.prompts.path=nowhere.jsonl"
    ended = subprocess.run(
        [sys.executable, "-m", "opd_lightning", "validate", *common, *LAYOUTS["ddp"], missing],
        cwd=said.folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("opd: error:") == 1
