"""Every shipped YAML is accepted, and its classes are built without a weight being loaded."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_lightning.commands.lightning_cli import OPDCLI
from opd_lightning.methods import SFT
from opd_lightning.models.student import Student

ROOT = Path(__file__).parents[2]
# What lm-eval reads, not we.
TASKS = ROOT / "configs" / "suites" / "lm_eval"
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent != TASKS)
# Files that complete a method's config rather than being one.
OVERLAYS = ("engine", "teacher", "strategy", "suites")


def trains_elsewhere(path: Path) -> bool:
    """Whether tests/integration/test_lab_configs.py trains with it."""
    return path.parent.name == "lab" and path.name != "opd.yaml"


def runs() -> list[Any]:
    """Return files by run: a method's config, or one with an overlay of each kind.

    Every file is in one of them.
    """
    methods = [path for path in CONFIGS if path.parent.name not in OVERLAYS]
    kinds = ([path for path in CONFIGS if path.parent.name == kind] for kind in OVERLAYS)
    layers = [[file for file in some if file] for some in zip_longest(*kinds)]
    overlaid = [[ROOT / "configs" / "lab" / "opd.yaml", *some] for some in layers]
    return [
        pytest.param(
            files,
            marks=pytest.mark.slow if len(files) == 1 and trains_elsewhere(files[0]) else (),
            id=" ".join(str(path.relative_to(ROOT / "configs")) for path in files),
        )
        for files in [*([path] for path in methods), *overlaid]
    ]


@pytest.mark.parametrize("files", runs())
def test_instantiates(files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if any("ReasoningGym" in file.read_text() for file in files):
        pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = OPDCLI(["fit", *(word for file in files for word in ("--config", str(file)))])
    assert cli.model.student.model is None
    assert not list(tmp_path.iterdir())


LARGE = [p for p in CONFIGS if p.parent.name in ("configs", "papers", "recipes")]


@pytest.mark.parametrize("file", LARGE, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_runs_of_large_models_take_another_number_of_gpus(file: Path) -> None:
    """Up to 16, and without another number of micro-batches, which a resumed run must not have."""
    settings = yaml.safe_load(file.read_text())
    assert settings["data"]["prompts_per_step"] % 16 == 0
    assert "accumulate_grad_batches" not in settings["trainer"]


class Keeping(SFT):
    """A user's method, which keeps its settings in checkpoints as Lightning lets it."""

    def __init__(self, student: Student, note: str = "") -> None:
        super().__init__(student)
        self.save_hyperparameters()


def test_a_method_may_keep_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    student = {"path": "lab/arithmetic/student"}
    model = {"class_path": f"{__name__}.Keeping", "init_args": {"student": student, "note": "a"}}
    data = {"engine": {"class_path": "opd_lightning.rollouts.HFEngine"}}
    cli = OPDCLI(["fit", f"--model={json.dumps(model)}", f"--data={json.dumps(data)}"])
    assert cli.model.hparams["note"] == "a"
    kept = cli.model.hparams["student"]["init_args"]  # plain data, and not the object
    assert kept["path"] == student["path"]


@pytest.mark.parametrize("words", [["--config=method.yaml"], [f"--model={__name__}.Keeping"]])
def test_another_method_keeps_the_adapter_of_an_earlier_file(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    student = {"path": "lab/arithmetic/student", "lora": {"r": 3, "target_modules": "all-linear"}}
    model = {"class_path": "opd_lightning.methods.SFT", "init_args": {"student": student}}
    data = {"engine": {"class_path": "opd_lightning.rollouts.HFEngine"}}
    Path("run.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    Path("method.yaml").write_text(f"model: {{class_path: {__name__}.Keeping}}")
    cli = OPDCLI(["fit", "--config=run.yaml", *words])
    assert type(cli.model) is Keeping
    lora = cli.model.student.lora
    assert lora is not None
    assert (lora.r, lora.target_modules) == (3, "all-linear")


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize(
    "command",
    [pytest.param(["fit"], marks=pytest.mark.slow), ["write_responses", "--out=responses.jsonl"]],
)
def test_the_parser_of_a_command_reads_what_that_of_the_program_would(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def through_the_program(cli: OPDCLI, parser: Any, args: list[str]) -> None:
        cli.config = parser.parse_args(args)

    monkeypatch.setattr(OPDCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda cli, subcommand: None)
    config = str(ROOT / "configs" / "lab" / "sdpo.yaml")
    words = [*command, "--config", config, "--seed_everything=3", "--trainer.max_steps=2"]
    alone = OPDCLI(words).config
    monkeypatch.setattr(OPDCLI, "parse_arguments", through_the_program)
    whole = OPDCLI(words).config
    assert whole.pop("config") is None  # every parser has this option
    assert alone == whole
    assert alone[command[0]].data.seed == 3
