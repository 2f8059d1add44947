"""Help, version and misspelt keys: right, and answered before the heavy imports."""

import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import callbacks
from opd_lightning import __version__
from opd_lightning.cli import main
from opd_lightning.commands.command_help import page
from opd_lightning.commands.command_table import COMMANDS, EXAMPLES, TRAINER_COMMANDS, overview
from opd_lightning.commands.known_keys import check_keys
from opd_lightning.commands.lightning_cli import OPDCLI
from opd_lightning.commands.signatures import find
from opd_lightning.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "lab" / "opd.yaml")
HEAVY = ["torch", "lightning", "transformers", "datasets", "peft", "matplotlib", "tensorboard"]
OPTION = re.compile(r"^  (?:-\w \w+, )?--([\w.]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def all_options() -> set[str]:
    """Options of the real parser of `opd fit`, as its whole help names them."""
    text = StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as ended:
        main(["fit", "--help=all"])
    assert ended.value.code == 0
    return set(OPTION.findall(text.getvalue()))


def test_nothing_heavy_is_imported() -> None:
    misspelt = "--data.sampling.max_new_tokns=3"
    calls = [["--help"], ["fit", "--help"], ["fit", "--config", CONFIG, misspelt]]
    program = f"""
import json, sys
from opd_lightning.cli import main
found = []
for words in {calls!r}:
    try:
        main(words)
    except SystemExit:
        pass
    found.append([name for name in {HEAVY!r} if name in sys.modules])
print(json.dumps(found))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == [[], [], []]
    assert "did you mean 'max_new_tokens'?" in ended.stderr


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert text == overview() + "\n"
    assert all(re.search(rf"^  {name}  +\w", text, re.MULTILINE) for name in COMMANDS)
    assert {name.replace("-", "_") for name in TRAINER_COMMANDS} == {*OPDCLI.subcommands()}
    named = set(re.findall(r"(?m)(?:^|`)opd ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= {*COMMANDS}
    assert len(EXAMPLES) == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"opd {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "did you mean 'fit'?"),
        (["cache-teachr"], "did you mean 'cache-teacher'?"),
        (["quux"], "expected one of fit, "),
        ([], "expected a command: fit, "),
        (["fit", "--print_shtab=bash"], "'print_shtab' is not accepted"),  # no shell completion
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert len(line) <= 400


def test_help_of_fit(monkeypatch: pytest.MonkeyPatch, all_options: set[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = page("fit")
    lines = text.splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 100
    assert "the newest whole checkpoint" in " ".join(text.split())
    assert all(f"\n  callbacks.{name} " in text for name in callbacks.__all__)
    assert "opd fit --help=all" in "\n".join(lines[-6:])
    shown = set(OPTION.findall(text))
    assert {"data.prompts_per_step", "trainer.max_steps", "model.student.path"} <= shown
    # What a class takes is in the whole help of that class, not in this one.
    assert {name for name in shown if not name.startswith("model.")} <= all_options


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: opd {command} ")
    assert "  --config FILE" in text


def test_every_real_option_is_known(all_options: set[str]) -> None:
    assert len(all_options) > 60
    for name in all_options - {"data.seed", "config"}:  # of seed_everything; a file
        try:
            check_keys("fit", [f"--{name}=1"])
        except UserError as error:  # of the value alone
            assert ": got 1, expected " in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "lm_eval")
)
def test_every_config_is_known(path: Path) -> None:
    check_keys("fit", ["--config", str(path)])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--dta.train=x", "--dta: 'dta' is not accepted; did you mean 'data'?"),
        ("--trainer.max_st=3", "did you mean 'max_steps'?"),  # abbreviated
        ("--ckpt=last", "did you mean 'ckpt_path'?"),
        ("--ckptpath=x", "did you mean 'ckpt_path'?"),
        ("--trainer.max_stepz=1", "--trainer.max_stepz: 'max_stepz' is not accepted"),
        ("--model.init_args.discont=1", "did you mean 'discount'?"),
        ("--model.student.pth=x", "did you mean 'path'?"),
        ("--model.optimizer.lrr=1", "did you mean 'lr'?"),
        ("--data.validation.sums.promts=x", "did you mean 'prompts'?"),
        ("--data.engine.max_batch_siz=1", "did you mean 'max_batch_size'?"),
    ],
)
def test_misspelt_option(word: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        check_keys("fit", ["--config", CONFIG, word])


def test_misspelt_key_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: callbacks.RolloutLog\n"
        "      init_args: {every_n_stepz: 3}\n"
    )
    with pytest.raises(UserError, match=r"run.yaml: trainer.callbacks.0.every_n_stepz: .*_steps'"):
        check_keys("fit", ["--config", str(path)])


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.callbacks+=callbacks.RolloutLog", "--trainer.callbacks.every_n_steps=3"],
        ["--data.engine=opd_lightning.rollouts.VLLMEngine", "--data.engine.dtype=bfloat16"],
        ["--data.template_args.enable_thinking=false"],
        ["--model.help", "opd_lightning.methods.OPD"],
        ["--data.engine=a.class.that.is.Nowhere", "--data.engine.anything=1"],
        # Lightning gives these to a class that the source does not name.
        [
            "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy",
            "--trainer.strategy.find_unused_parameters=true",
        ],
        [
            "--trainer.profiler=lightning.pytorch.profilers.PyTorchProfiler",
            "--trainer.profiler.profile_memory=true",
        ],
    ],
)
def test_left_to_the_parser(words: list[str]) -> None:
    check_keys("fit", ["--config", CONFIG, *words])


def test_no_such_file() -> None:
    with pytest.raises(UserError, match=r"^--config: got 'nowhere.yaml'"):
        check_keys("fit", ["--config", "nowhere.yaml"])


def test_a_file_may_append(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text("trainer:\n  callbacks+:\n    - class_path: callbacks.RolloutLog\n")
    check_keys("fit", ["--config", CONFIG, "--config", str(path)])


def test_a_list_replaces_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "      init_args: {monitor: loss}\n"
    )
    words = ["--trainer.callbacks+=callbacks.RolloutLog", "--config", str(path)]
    check_keys("fit", [*words, "--trainer.callbacks.patience=3"])
    with pytest.raises(UserError, match="'every_n_steps' is not accepted"):
        check_keys("fit", [*words, "--trainer.callbacks.every_n_steps=3"])


def test_a_class_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rules.py").write_text(
        "from opd_lightning.methods import OPD\n"
        "raise ImportError('must not be imported')\n"
        "class Mine(OPD):\n"
        "    def __init__(self, *, sharpness: float = 1.0, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "class Opaque(OPD):\n"
        "    def __init__(self, **kwargs):\n"
        "        OPD.__init__(self, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--config", CONFIG, "--model=own_rules.Mine", "--model.sharpness=2"]
    check_keys("fit", [*words, "--model.student.path=x"])
    with pytest.raises(UserError, match="did you mean 'sharpness'"):
        check_keys("fit", [*words, "--model.sharpnss=2"])
    opaque = find("own_rules.Opaque")
    assert opaque is not None
    assert opaque.options() is None
