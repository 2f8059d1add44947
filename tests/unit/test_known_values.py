"""Values that no type of an option allows are refused from the source, before heavy imports."""

import os
from pathlib import Path

import pytest
import yaml

from opd_lightning.commands.known_keys import check_keys
from opd_lightning.commands.parser_messages import one_line
from opd_lightning.commands.parsers import OneLineParser
from opd_lightning.errors import UserError

CLASSES = {
    "model": "opd_lightning.methods.OPD",
    "model.teacher": "opd_lightning.teachers.FrozenTeacher",
    "model.optimizer": "torch.optim.AdamW",
    "model.lr_scheduler": "torch.optim.lr_scheduler.OneCycleLR",
    "data.engine": "opd_lightning.rollouts.HFEngine",
    "data.verifier": "opd_lightning.verifiers.ExactMatch",
    "trainer.logger": "lightning.pytorch.loggers.TensorBoardLogger",
}


def check(*words: str) -> None:
    check_keys("fit", [*(f"--{option}={name}" for option, name in CLASSES.items()), *words])


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        check(*words)
    message = str(caught.value)
    assert len(message) <= 400
    assert "\n" not in message
    return message


def in_file(folder: Path, option: str, value: str) -> str:
    """A file with one option, whose value is written as in YAML."""
    for key in reversed(option.split(".")):
        value = f"{{{key}: {value}}}"
    path = folder / "more.yaml"
    path.write_text(value + "\n")
    assert yaml.safe_load(path.read_text())
    return str(path)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *[
            (option, "null", "got null, expected")
            for option in (
                "seed_everything",
                "data.prompts_per_step",
                "data.sampling",
                "data.sampling.temperature",
                "data.mix",
                "data.max_staleness",
                "data.train.path",
                "data.engine_time_limit",
                "model.max_logprob_gap",
                "model.student",
                "trainer.max_steps",
                "trainer.devices",
                "trainer.accumulate_grad_batches",
            )
        ],
        ("data.prompts_per_step", "2.5", "got 2.5, expected a whole number"),
        ("data.prompts_per_step", "many", "got 'many', expected a whole number"),
        ("data.prompts_per_step", "[2]", "got [2], expected a whole number"),
        ("data.prompts_per_step", "{a: 2}", "expected a whole number"),
        ("data.sampling.temperature", ".nan", "expected a number"),
        ("data.max_staleness", "2", "expected one of 0, 1"),
        ("model.aggregation", "token-meen", "did you mean 'token-mean'?"),
        ("model.optimizer.lr", ".nan", "expected a number"),
        ("model.optimizer.lr", "fast", "expected a number"),
        ("model.rules", "[null]", "item 0: got null, expected a class"),
        ("model.student", "[1]", "got [1], expected a class"),
        ("data.engine", "3", "got 3, expected a class"),
        ("data.verifier", '"\\ufeff"', "got a text that holds nothing, expected a class"),
        ("model.lr_scheduler", '" "', "got a text that holds nothing, expected a class"),
        ("model.optimizer", "{}", "got {}, expected a class"),
        ("model.lr_scheduler", "{}", "got {}, expected a class"),
        ("trainer.deterministic", "'&a'", "got '&a', expected one of warn or true or false"),
        ("data.verifier", "'# b'", "got '# b', expected a class"),
        ("data.validation", "[1]", "got [1], expected a table of names and values"),
        ("trainer.callbacks", "3", "got 3, expected a list or a class"),
        ("seed_everything", "4294967296", "expected 0 to 4294967295"),
        ("seed_everything", "-1", "expected 0 to 4294967295"),
        ("seed_everything", ".inf", "expected a whole number"),
        ("data.prompts_per_step", "1" + "0" * 25, "expected a whole number"),
        ("data.sampling.temperature", "1" + "0" * 400, "expected a number"),
        ("data.seed", "7", "seed_everything's"),
        ("model", "opd_lightning.methods.ODP", "did you mean 'opd_lightning.methods.OPD'?"),
        ("model", "opd_lightning.method.OPD", "did you mean 'opd_lightning.methods.OPD'?"),
        ("data.engine", "opd_lightning.rollouts.HFEngin", "mean 'opd_lightning.rollouts.HFEngine'"),
    ],
)
def test_refused_in_files_and_on_the_command_line(
    option: str, value: str, said: str, tmp_path: Path
) -> None:
    found = refusal("--config", in_file(tmp_path, option, value))
    assert said in found
    assert found.startswith(f"{tmp_path / 'more.yaml'}: {option}: ")
    if '"' not in value:
        value = value.strip("'")  # as words of a command line
        found = refusal(f"--{option}={value}")
        assert said in found
        assert found.startswith(f"--{option}: ")


@pytest.mark.parametrize("section", ["model", "data", "trainer"])
@pytest.mark.parametrize("value", ["null", "[1]", "3", "true", '" "'])
def test_a_section_is_a_table(section: str, value: str, tmp_path: Path) -> None:
    assert f": {section}: got " in refusal("--config", in_file(tmp_path, section, value))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed_everything", "true"),
        ("seed_everything", "4294967295"),
        ("data.verifier", "null"),
        ("data.engine", "null"),
        ("data.train", "null"),
        ("data.engine_time_limit", ".inf"),
        ("data.sampling.temperature", "1"),
        ("data.sampling.temperature", "1e-1"),
        ("data.prompts_per_step", "4.0"),
        ("data.template_args", "{enable_thinking: null}"),
        ("model.optimizer.lr", "1e-5"),
        ("model.lr_scheduler", "null"),
        ("model.rules", "[]"),
        ("trainer.devices", "[0, 1]"),
        ("trainer.devices", "auto"),
        ("trainer.limit_val_batches", "0.5"),
        ("trainer.gradient_clip_val", "null"),
        ("trainer.logger", "false"),
        ("trainer.max_time", "00:01:00:00"),
        ("trainer.callbacks", "[]"),
        ("trainer.strategy", "opd_lightning.hsdp.HSDPStrategy"),
        ("trainer.callbacks", "[{class_path: opd_lightning_callbacks.RolloutLog}]"),
        ("trainer.callbacks", "[{class_path: callbacks.rollout_log.RolloutLog}]"),
        ("data.verifier", "ExactMatch"),  # the parser accepts it
        ("model.optimizer", "torch.optim.Nonsense"),  # left to the parser
    ],
)
def test_left_to_the_parser(option: str, value: str, tmp_path: Path) -> None:
    check("--config", in_file(tmp_path, option, value))
    check(f"--{option}={value}")


def test_a_class_in_a_list_and_arguments_beside_it(tmp_path: Path) -> None:
    rule = "[{class_path: opd_lightning.rules.SignGat}]"
    found = refusal("--config", in_file(tmp_path, "model.rules", rule))
    assert "model.rules.0: there is no class" in found
    assert "did you mean 'opd_lightning.rules.SignGate'?" in found
    beside = "[{class_path: callbacks.RolloutLog, every_n_steps: 3}]"
    found = refusal("--config", in_file(tmp_path, "trainer.callbacks", beside))
    assert "trainer.callbacks.0.every_n_steps: stands beside class_path" in found
    assert found.endswith("put every_n_steps under init_args")


def test_a_name_of_two_million_characters_is_cut() -> None:
    huge = "x" * 2_000_000
    for word in (f"--{huge}=1", f"--data.{huge}=1", f"--data.prompts_per_step={huge}"):
        assert refusal(word)
    assert refusal(f"--model=opd_lightning.methods.{huge}")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Parser key \"data.prompts_per_step\":\n  Expected a <class 'int'>. Got value: many",
            "data.prompts_per_step: expected a whole number, got many",
        ),
        ("the following arguments are required: fit.model", "model: got nothing, expected a value"),
        ("Group 'data' does not accept option 'x'", "data.x is not accepted"),
        ("unrecognized arguments: --x 3", "not accepted: --x 3"),
        (
            'Parser key "a":\n  Unable to load config \'x\'\nParser key "a":\n'
            '  Unable to load config "x"',
            'a: expected options, or a YAML file of them, got "x"',
        ),
        (
            """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'm.Base'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'm.Sub':
        Option 'betta' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: m.Sub""",
            "model: 'm.Sub': Option 'betta' is not accepted, got m.Sub",
        ),
        (
            """Parser key "model":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'm.Sub':
        Parser key "teacher":
          Problem with given class_path 'm.Teacher':
            the following arguments are required: path
    - Expected a <class 'NoneType'>""",
            "model.teacher.path: got nothing, expected a value",
        ),
        (
            """Parser key "model":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'm.Sub':
        Parser key "imitation":
          Does not validate against any of the Union subtypes
          Errors:
            - Expected a <class 'float'>
            - Not a valid subclass of Schedule
              Subclass types expect one of:
              - a class path (str)
              - a dict with class_path entry
            - Expected a <class 'NoneType'>
          Given value: {}
    - Expected a <class 'NoneType'>""",
            "model.imitation: expected a number; expected a class of Schedule "
            "(class_path and init_args), got {}",
        ),
        (
            """Parser key "model":
  Problem with given class_path 'm.Sub':
    Parser key "optimizer":
      - Type typing.Callable[[x], y.Z] expects a function or a callable class: Option 'a' is """
            """not accepted. Got value: Namespace(class_path='y.Z')
      - Expected a <class 'int'>""",
            "model.optimizer: Option 'a' is not accepted",
        ),
    ],
)
def test_messages_of_the_parser(message: str, line: str) -> None:
    assert one_line(message) == line


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    line = one_line(f"Parser key \"a\": Expected a <class 'int'>. Got value: {'9' * 5000}")
    assert line.startswith("a: expected a whole number, got 999")
    assert len(line) <= 400
    words = one_line("start " + "word " * 500 + "end")
    assert len(words) <= 400
    assert (words[:5], words[-3:]) == ("start", "end")


ENGINE = "{class_path: opd_lightning.rollouts.HFEngine, init_args: {max_batch_size: 4%s}}"


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("data.engine", ENGINE % ", max_batch_size: 8", ":1: 'max_batch_size' is set a second"),
        ("data.engine", ENGINE % ", max_batch: 8", ": data.engine.max_batch: 'max_batch' is not"),
        ("data.sampling", "max_new_tokens: 4\nmax_new_tokens: 5", ":2: 'max_new_tokens' is set a"),
        ("data", "seed: 1", ": data.seed: is seed_everything's"),
        ("model", "class_path: a\nclass_path: b", ":2: 'class_path' is set a second time"),
        ("trainer.callbacks", "- a: &a [*a]", ":1: an anchor contains an alias of itself"),
        ("model.rules", "- {class_path: opd_lightning.rules.SignGat}", ": model.rules.0: there is"),
        ("data.engine", "# \udce9", ":1: byte 2 is not UTF-8"),
    ],
)
def test_files_of_settings_are_read(option: str, text: str, said: str, tmp_path: Path) -> None:
    """Named on the command line, or in a file beside them."""
    (tmp_path / "part.yaml").write_text(text, errors="surrogateescape")
    part = str(tmp_path / "part.yaml")
    assert refusal(f"--{option}={part}").startswith(part + said)
    assert refusal("--config", in_file(tmp_path, option, "part.yaml")).startswith(part + said)


def test_files_of_settings_that_are_good_or_no_files(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(ENGINE % "")
    check(f"--data.engine={tmp_path / 'part.yaml'}", "--data.engine.max_batch_size=2")
    check(f"--data.train.path={tmp_path / 'part.yaml'}")  # a text
    (tmp_path / "text.yaml").write_text("text.yaml")
    check(f"--data.engine={tmp_path / 'text.yaml'}")  # the parser knows best
    itself = "{class_path: opd_lightning.methods.OPD, init_args: {teacher: again.yaml}}"
    (tmp_path / "again.yaml").write_text(itself)
    assert "names itself" in refusal(f"--model={tmp_path / 'again.yaml'}")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe or device" in refusal(f"--data.engine={tmp_path / 'pipe'}")


def test_a_number_beyond_what_its_types_hold_is_refused_though_a_text_would_do() -> None:
    assert "trainer.val_check_interval" in refusal(f"--trainer.val_check_interval=1{'0' * 400}")


def test_a_table_of_options_has_no_subclasses() -> None:
    given = "{class_path: torch.nn.Linear, init_args: {}}"
    said = refusal(f"--data.sampling={given}")
    assert "data.sampling: got the class torch.nn.Linear, expected the options of Sampling" in said
    check("--data.sampling={class_path: opd_lightning.rollouts.Sampling, init_args: {}}")


@pytest.mark.parametrize("value", ["#", "# pilot", "&run", "?", "!!null", "---", "\ufeff"])
def test_what_yaml_makes_nothing_of_is_a_text_on_the_command_line(value: str) -> None:
    """The parser takes a text for YAML where null is allowed, too."""
    parser = OneLineParser()
    parser.add_argument("--name", type=str | None)
    assert parser.parse_args([f"--name={value}"]).name == value
    assert parser.parse_args(["--name=null"]).name is None


def test_bytes_that_are_no_text_are_refused() -> None:
    assert refusal("--model.teacher.path=\udcff").startswith(
        "--model.teacher.path: holds '\\udcff'"
    )
    with pytest.raises(UserError, match="no UTF-8"):
        OneLineParser().parse_args(["--name=\udcff"])


@pytest.mark.parametrize("option", ["model", "data", "data.engine", "data.sampling"])
def test_a_file_of_settings_that_is_missing(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "got 'missing.yaml', but no such file exists"
    assert refusal(f"--{option}=missing.yaml") == f"--{option}: {said}"
    file = in_file(tmp_path, option, "missing.yaml")
    assert refusal(f"--config={file}") == f"{file}: {option}: {said}"
    (tmp_path / "missing.yaml").write_text("{}")
    check(f"--{option}=missing.yaml")
