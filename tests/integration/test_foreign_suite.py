"""The suite of docs/extending.md, from another package: measured, compared, logged like ours."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.rollouts.base import Request
from tests import snippets

CONFIG = str(snippets.ROOT / "configs" / "lab" / "opd.yaml")
QUESTIONS = ("1+1", "20+30", "7-5")


@pytest.fixture
def suites(in_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration that adds the suite; the untrained student has two of three answers right."""
    snippets.write("extending.md", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    source = ModelSource("lab/arithmetic/student")
    prompts = [
        source.tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
        )
        for q in QUESTIONS
    ]
    engine = HFEngine()
    engine.start(source, max_length=32)
    requests = [Request(ids, seed=0) for ids in prompts]
    written = engine.generate(requests, Sampling(temperature=0.0, max_new_tokens=4))
    texts = [source.tokenizer.decode(w.response_ids, skip_special_tokens=True) for w in written]
    table = dict(zip(QUESTIONS, [*texts[:2], texts[2] + "?"], strict=True))
    suite = {"class_path": "fixed_answers.FixedAnswers", "init_args": {"table": table}}
    path = tmp_path / "suites.yaml"
    path.write_text(yaml.safe_dump({"data": {"suites": {"table": suite}}}))
    return str(path)


def test_it_is_measured_beside_ours(
    suites: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    main(
        ["validate", "--config", CONFIG, "--config", suites, "--out", str(out),
         "--data.sampling.max_new_tokens=4", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    found = json.loads(out.read_text())["suites"]
    assert list(found) == ["sums", "table"]
    assert found["table"] == {"score": pytest.approx(2 / 3)}
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["table", "0.667"] in lines


def test_a_run_may_be_judged_by_it(suites: str, tmp_path: Path) -> None:
    main(
        ["fit", "--config", CONFIG, "--config", suites,
         "--trainer.callbacks+=callbacks.CapabilityRetention",
         "--trainer.callbacks.init_args.targets=[sums]",
         f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}", "--trainer.max_steps=1",
         "--trainer.val_check_interval=1", "--data.prompts_per_step=4",
         "--data.sampling.max_new_tokens=4", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    first, *_ = events.Scalars("val/table/score")
    assert (first.step, first.value) == (0, pytest.approx(2 / 3))
    assert events.Scalars("retention/worst")[0].value == 0
    assert "delta/table" in str(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"table": {}}, "data.suites.empty.table: got no question"),
        ({"tabel": {"1+1": "2"}}, "tabel"),
    ],
)
def test_its_own_mistakes_end_in_one_line(
    arguments: dict[str, Any], line: str, suites: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {"class_path": "fixed_answers.FixedAnswers", "init_args": arguments}
    with pytest.raises(SystemExit) as end:
        main(["validate", "--config", CONFIG, f"--data.suites={json.dumps({'empty': wrong})}"])
    assert end.value.code == 2
    assert line in capfd.readouterr().err.strip().splitlines()[-1]
