"""Wrong input is answered in one line, before any weight loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from opd_lightning.commands.lightning_cli import as_yaml
from tests.refusals import forbid_weights

CONFIG = str(Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml")

Fail = Callable[..., str]


@pytest.fixture
def fail(
    in_lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Fail:
    """Run `opd fit` with changes; it must end with code 2, one error line and no weights."""

    forbid_weights(monkeypatch)

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
    assert "data.max_staleness" in fail("--data.max_staleness=2")


def test_wrong_value(fail: Fail) -> None:
    assert "got -1.0, expected >= 0" in fail("--data.sampling.temperature=-1")
    assert "data.prompts_per_step: got 0, expected at least 1" in fail("--data.prompts_per_step=0")


def test_wrong_value_inside_a_union(fail: Fail) -> None:
    assert "regular expression" in fail("--data.verifier.init_args.pattern=((")
    assert "unknown field 'question'" in fail('--data.train.columns={"question": "q"}')
    suite = "--data.validation={x: {prompts: {path: a}, batch_size: 0}}"
    assert "batch_size of a suite: got 0" in fail(suite)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab"], "expected a command: build,demo; `opd lab --help`"),
        (["lab", "bild"], "got the command 'bild', expected 'build', 'demo'"),
        (["lab", "build", "--world=mars"], "world: expected one of 'arithmetic', 'identity'"),
        (["lab", "build", "--wor=identity"], "not accepted: --wor=identity"),  # abbreviated
        (["serve", "--model=x"], "key_file: got nothing, expected a value; `opd serve --help`"),
        (["serve", "--model=x", "--key=k"], "not accepted: --key=k"),
        (["serve", "--model=x", "--key_file=k", "--port=many"], "port: expected a whole number"),
        (["compare"], "runs: got nothing, expected a value; `opd compare --help`"),
        (["compare", "x", "--gr=true"], "not accepted: --gr=true"),
        (
            ["write-responses", f"--config={CONFIG}"],
            "out: got nothing, expected a value; `opd write-",
        ),
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


@pytest.mark.parametrize(
    "option",
    [
        "data.train.path",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("model.student.path", "ckpt_path")),
    ],
)
def test_a_name_that_is_too_long(option: str, fail: Fail) -> None:
    line = fail(f"--{option}=./{'x' * 300}")
    assert "too long" in line
    assert len(line) <= 420


def test_tasks_of_slurm_without_their_nodes(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NTASKS", "4"), ("JOB_ID", "7"), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert "use --ntasks-per-node" in fail()


def test_two_callbacks_that_save_under_one_name(fail: Fail) -> None:
    saver = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    line = fail(saver, "--trainer.callbacks.every_n_train_steps=50")  # as the configuration's
    assert "trainer.callbacks: got two of ModelCheckpoint with the same `state_key`" in line


def test_missing_checkpoint(fail: Fail) -> None:
    assert "no checkpoint at 'nowhere.ckpt'" in fail("--ckpt_path=nowhere.ckpt")


def test_unknown_class(fail: Fail) -> None:
    assert "opd_lightning.methods.ODP" in fail("--model=opd_lightning.methods.ODP")
    assert "HFEngin" in fail("--data.engine=opd_lightning.rollouts.HFEngin")
    line = fail("--data.verifier=opd_lightning.rollouts.HFEngine")
    assert "Verifier" in line
    assert "HFEngine" in line


@pytest.mark.parametrize("option", ["--model", "--data.verifier", "--trainer.callbacks+"])
def test_a_module_that_cannot_be_imported(
    option: str, fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def f():\n    return {}['key']\n\n\nf()\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = fail(f"{option}=broken.Mine")
    assert line.endswith(f"; KeyError in '{tmp_path / 'broken.py'}', line 5")


def test_missing_prompt_file(fail: Fail) -> None:
    assert "nowhere.jsonl" in fail("--data.train.path=nowhere.jsonl")


def test_missing_config_file(fail: Fail) -> None:
    assert "nowhere.yaml" in fail("--config=nowhere.yaml")


@pytest.mark.parametrize(
    "form",
    [
        "--{} None",
        *(
            pytest.param(form, marks=pytest.mark.slow)
            for form in ("--{}=null", "--{}=None", "--{} null")
        ),
    ],
)
def test_null_is_nothing_and_no_text(
    form: str, in_lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data.engine.device", "model.teacher.attn_implementation", "data.verifier"]
    words = [word for option in options for word in form.format(option).split()]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", CONFIG, *words, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for option in options:
        settings = printed
        for name in option.split("."):
            settings = settings.get("init_args", settings)[name]
        assert settings is None, option


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
