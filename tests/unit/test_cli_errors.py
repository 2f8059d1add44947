"""Wrong input is answered in one line, before any weight loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from opd_lightning.commands.lightning_cli import as_yaml
from opd_lightning.models import causal_lm
from tests.harness_tasks import write_tasks

CONFIG = str(Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml")

Fail = Callable[..., str]


@pytest.fixture
def fail(
    in_lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Fail:
    """Run `opd fit` with changes; it must end with code 2, one error line and no weights."""

    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(causal_lm, "load_causal_lm", no_weights)
    monkeypatch.setattr("opd_lightning.models.student.load_causal_lm", no_weights)
    monkeypatch.setattr("opd_lightning.teachers.frozen.load_causal_lm", no_weights)

    def run(*changes: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", CONFIG, "--trainer.logger=false", *changes])
        assert ended.value.code == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_unknown_key(fail: Fail) -> None:
    assert "data.sampling.temprature" in fail("--data.sampling.temprature=1")
    assert "'betta' is not accepted" in fail("--model.init_args.betta=1")


def test_wrong_type(fail: Fail) -> None:
    line = fail("--data.prompts_per_step=many")
    assert "data.prompts_per_step" in line
    assert "many" in line
    assert "discount" in fail("--model.init_args.discount=much")


def test_wrong_value(fail: Fail) -> None:
    assert "got -1.0, expected >= 0" in fail("--data.sampling.temperature=-1")
    assert "whole distribution" in fail("--data.sampling.temperature=0")
    assert "data.prompts_per_step: got 0, expected at least 1" in fail("--data.prompts_per_step=0")


def test_wrong_value_inside_a_union(fail: Fail) -> None:
    assert "regular expression" in fail("--data.verifier.init_args.pattern=((")
    assert "limit must be at least 1" in fail("--data.train.limit=0")
    assert "unknown field 'question'" in fail('--data.train.columns={"question": "q"}')
    assert "max_batch_size: got 0" in fail("--data.engine.init_args.max_batch_size=0")
    suite = "--data.validation={x: {prompts: {path: a}, batch_size: 0}}"
    assert "batch_size of a suite: got 0" in fail(suite)
    texts = "--data.texts={sums: {prompts: {path: a}}}"
    assert "data.texts: got 'sums', the name of another suite" in fail(texts)


def test_tasks_that_cannot_be_had(fail: Fail, tmp_path: Path) -> None:
    choice = "{sums: {task: choice, include_path: tasks}}"
    assert "data.tasks: got 'sums', the name of another suite" in fail(f"--data.tasks={choice}")
    folder = write_tasks(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    line = fail(f"--data.tasks={{quiz: {{task: choice, include_path: {folder}}}}}")
    assert "data.tasks.quiz: cannot load 'choice': FileNotFoundError" in line


def test_what_training_cannot_use(fail: Fail) -> None:
    assert "whole distribution" in fail("--data.sampling.top_p=0.9")
    assert "lora_dropout: got 0.1" in fail("--model.init_args.student.lora={lora_dropout: 0.1}")
    assert "trainer.precision: got 'bf16-true'" in fail("--trainer.precision=bf16-true")
    line = fail("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=5")
    assert "val_check_interval: got 5 micro-batches" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab"], "expected a command: build,demo; `opd lab --help`"),
        (["lab", "bild"], "got the command 'bild', expected 'build', 'demo'"),
        (["lab", "build", "--world=mars"], "world: expected one of 'arithmetic', 'identity', got"),
        (["lab", "build", "--wor=identity"], "not accepted: --wor=identity"),  # abbreviated
        (["serve", "--model=x"], "key_file: got nothing, expected a value; `opd serve --help`"),
        (["serve", "--model=x", "--key=k"], "not accepted: --key=k"),
        (["serve", "--model=x", "--key_file=k", "--port=many"], "port: expected a whole number"),
        (["compare"], "runs: got nothing, expected a value; `opd compare --help`"),
        (["compare", "x", "--gr=true"], "not accepted: --gr=true"),
        (["--config", "nowhere.yaml", "fit"], "nowhere.yaml"),
    ],
)
def test_other_commands_end_alike(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: error: ")
    assert said in line


@pytest.mark.parametrize("option", ["data.train.path", "model.student.path", "ckpt_path"])
def test_a_name_that_is_too_long(option: str, fail: Fail) -> None:
    line = fail(f"--{option}=./{'x' * 300}")
    assert "too long" in line
    assert len(line) <= 420


def test_schedulers_that_wait_for_a_metric(fail: Fail) -> None:
    name = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    assert "model.lr_scheduler: got ReduceLROnPlateau" in fail(f"--model.lr_scheduler={name}")


def test_tasks_of_slurm_without_their_nodes(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NTASKS", "4"), ("JOB_ID", "7"), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert "use --ntasks-per-node" in fail()


def test_missing_checkpoint(fail: Fail) -> None:
    assert "no checkpoint at 'nowhere.ckpt'" in fail("--ckpt_path=nowhere.ckpt")


def test_heads_of_different_size(fail: Fail, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree("lab/arithmetic/teacher", teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    line = fail(
        "--model=opd_lightning.methods.DivergenceOPD",
        f"--model.init_args.teacher.init_args.path={teacher}",
    )
    assert "heads of 64 and 128 tokens" in line


def test_a_role_the_template_refuses(fail: Fail, tmp_path: Path) -> None:
    teacher_template = "{{ raise_exception('no system role') }}"
    shutil.copytree("lab/arithmetic/student", tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text(teacher_template)
    line = fail(
        f"--model.init_args.student.path={tmp_path / 'student'}",
        f"--model.init_args.teacher.init_args.path={tmp_path / 'student'}",
    )
    assert "chat template refuses the messages: no system role" in line


def test_unknown_class(fail: Fail) -> None:
    assert "opd_lightning.methods.ODP" in fail("--model=opd_lightning.methods.ODP")
    assert "HFEngin" in fail("--data.engine=opd_lightning.rollouts.HFEngin")
    line = fail("--data.verifier=opd_lightning.rollouts.HFEngine")
    assert "Verifier" in line
    assert "HFEngine" in line


def test_missing_config_file(fail: Fail) -> None:
    assert "nowhere.yaml" in fail("--config=nowhere.yaml")


def test_missing_prompt_file(fail: Fail) -> None:
    assert "nowhere.jsonl" in fail("--data.train.path=nowhere.jsonl")


def test_missing_model(fail: Fail) -> None:
    line = fail("--model.init_args.student.path=lab/arithmetic/pupil")
    assert "student model: no config.json in 'lab/arithmetic/pupil'" in line
    assert "teacher model" in fail("--model.init_args.teacher.init_args.path=./nowhere")


def test_malformed_row(fail: Fail, tmp_path: Path) -> None:
    rows = Path("lab/arithmetic/train.jsonl").read_text().splitlines()
    rows[2] = rows[2][:-5]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    assert "bad.jsonl:3:" in fail(f"--data.train.path={tmp_path / 'bad.jsonl'}")


def test_empty_prompt_file(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in fail(f"--data.train.path={tmp_path / 'empty.jsonl'}")


def test_prompt_longer_than_the_context(fail: Fail, tmp_path: Path) -> None:
    row = {"messages": "1+" * 150, "answer": "1"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    line = fail(f"--data.train.path={tmp_path / 'long.jsonl'}")
    assert "long.jsonl:1: prompt of 303 tokens + max_new_tokens 64 exceeds" in line
    assert "context of 256" in line


def test_answer_missing_for_the_verifier(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": "1+1="}))
    assert "open.jsonl:1" in fail(f"--data.train.path={tmp_path / 'open.jsonl'}")


def test_different_tokenizers(fail: Fail, tiny_model_dir: Callable[..., Path]) -> None:
    line = fail(f"--model.init_args.teacher.init_args.path={tiny_model_dir()}")
    assert "have different tokenizers" in line
    assert "use models of one family" in line


def test_more_micro_batches_than_rollouts(fail: Fail) -> None:
    validation = "--trainer.val_check_interval=6"
    line = fail("--data.prompts_per_step=2", "--trainer.accumulate_grad_batches=3", validation)
    assert "trainer.accumulate_grad_batches: got 3 for 2 rollouts" in line


def test_recorded_responses(fail: Fail) -> None:
    assert "set model.init_args.imitation" in fail("--data.mix.recorded=1")
    imitation = "--model.init_args.imitation=1.0"
    assert "no 'response' or 'response_ids'" in fail("--data.mix.recorded=1", imitation)


def test_no_engine(fail: Fail) -> None:
    assert "data.engine: got nothing" in fail("--data.engine=null")


@pytest.mark.parametrize("word", ["null", "None"])
@pytest.mark.parametrize(
    "option", ["data.engine.device", "model.teacher.attn_implementation", "data.verifier"]
)
def test_null_is_nothing_and_no_text(
    option: str, word: str, in_lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ([f"--{option}={word}"], [f"--{option}", word]):
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", CONFIG, *value, "--print_config"])
        assert ended.value.code == 0
        settings = yaml.safe_load(capsys.readouterr().out)
        for name in option.split("."):
            settings = settings.get("init_args", settings)[name]
        assert settings is None


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("--a.b={'c': None, 'd': [1, None]}", '--a.b={"c": null, "d": [1, null]}'),
        ("--prompt=Is it None?", "--prompt=Is it None?"),
        ("'None'", "'None'"),
        ("--a={None, 1}", "--a={None, 1}"),
    ],
)
def test_what_python_wrote_is_read_as_yaml(word: str, read: str) -> None:
    assert as_yaml(word) == read
