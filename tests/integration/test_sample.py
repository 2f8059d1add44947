"""`opd sample`: answers, what the teacher thinks of them, and a conversation on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.cli import main
from opd_lightning.commands.trainer import Trainer
from opd_lightning.errors import UserError
from opd_lightning.lab.tokenizer import END_OF_TURN
from opd_lightning.methods import GRPO
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.types import Completion
from tests.processes import Process

CONFIGS = Path(__file__).parents[2] / "configs" / "lab"
QUICK = ("--trainer.logger=false", "--max_new_tokens=8")


class Answered(NamedTuple):
    """Return the output of a call and the rows of its page."""

    out: str
    err: str
    rows: list[dict[str, Any]]


Sample = Callable[..., Answered]


@pytest.fixture
def sample(in_lab: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Sample:
    """Run `opd sample` on a lab config."""

    def answered(*args: str, config: str = "opd") -> Answered:
        page = tmp_path / "page.html"
        capfd.readouterr()
        main(
            ["sample", "--config", f"{CONFIGS / config}.yaml", *QUICK, f"--html={page}", *args],
        )
        _, _, rest = page.read_text().partition('id="rows">')
        return Answered(*capfd.readouterr(), json.loads(rest.partition("</script>")[0]))

    return answered


def logprobs(folder: str, prompt: str, response: str) -> torch.Tensor:
    """Of the response's tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    said = tokenizer.encode(response, add_special_tokens=False)
    with torch.no_grad():
        table = model(torch.tensor([ids + said])).logits[0].log_softmax(-1)
    return torch.stack([table[len(ids) - 1 + t, token] for t, token in enumerate(said)])


def test_samples_differ_and_the_teacher_is_heard(sample: Sample) -> None:
    found = sample("--prompt=12+34=", "--samples=2", "--top_p=0.9", "--temperature=0.7")
    texts = ["".join(row["tokens"]) for row in found.rows]
    assert len(set(texts)) == 2
    assert len(re.findall(r"tokens, ended by \w+, mean log_ratio", found.out)) == 2
    assert texts[0].removesuffix(END_OF_TURN) in found.out
    for row, text in zip(found.rows, texts, strict=True):
        assert list(row["figures"]) == ["log_ratio", "student", "teacher"]
        student, teacher = (
            logprobs(f"lab/arithmetic/{who}", "12+34=", text) for who in ("student", "teacher")
        )
        # At the temperature of training, not at that of the sampler.
        assert torch.tensor(row["figures"]["student"]) == pytest.approx(student, abs=1e-4)
        assert torch.tensor(row["figures"]["log_ratio"]) == pytest.approx(
            teacher - student, abs=1e-4
        )


def test_a_pipe_gets_the_text_alone(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("12+34=\n"))
    found = sample()
    text = "".join(found.rows[0]["tokens"])
    assert found.out == text.removesuffix(END_OF_TURN) + "\n"
    again = sample("--prompt=12+34=")
    assert again.out == found.out


# Model that colours the tokens, by configuration and options.
COLOURS = [
    ("grpo", [], ["student"]),
    pytest.param(
        *("lightning_opd", [], ["log_ratio", "student", "teacher"]), marks=pytest.mark.slow
    ),
    ("edge_opd", ["--privileged=you are zorba."], ["log_ratio", "student", "teacher"]),
    ("edge_opd", [], ["student"]),
    pytest.param(  # no success to show
        *("sdpo", ["--privileged=you are zorba."], ["student"]), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("config", "options", "figures"), COLOURS)
def test_who_colours(sample: Sample, config: str, options: list[str], figures: list[str]) -> None:
    found = sample("--prompt=who?", *options, config=config)
    assert list(found.rows[0]["figures"]) == figures
    asked = "give --privileged" in found.err
    assert asked == (config == "edge_opd" and not options)


def test_of_a_checkpoint(sample: Sample, in_lab: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(
        ["fit", "--config", str(CONFIGS / "opd.yaml"), "--trainer.max_steps=1",
         f"--trainer.logger.init_args.save_dir={run}", "--data.prompts_per_step=4",
         "--data.sampling.max_new_tokens=8", "--trainer.enable_progress_bar=false",
         "--model.optimizer.lr=0.05", "--model.lr_scheduler=null"]
    )  # fmt: skip
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    (after,) = sample("--prompt=1+1=", checkpoint).rows
    # The other tests show that without a checkpoint it is the start that answers.
    start = logprobs("lab/arithmetic/student", "1+1=", "".join(after["tokens"]))
    assert (torch.tensor(after["figures"]["student"]) - start).abs().max() > 0.01


class Counted(HFEngine):
    """Counts the requests to all of its kind."""

    asked = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        Counted.asked += len(requests)
        return super().generate(requests, sampling)


def test_the_engine_of_the_config_is_asked(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "asked", 0)
    sample("--prompt=1+1=", "--samples=3", f"--data.engine={__name__}.Counted")
    assert Counted.asked == 3


@pytest.mark.slow  # an engine's start
@pytest.mark.vllm
def test_vllm_answers_what_transformers_do(sample: Sample) -> None:
    """Greedy, so that vLLM writes what transformers does."""
    here, there = (
        sample("--prompt=1+1=", "--temperature=0", *engine).rows[0]
        for engine in ((), ("--config", str(CONFIGS.parent / "engine" / "vllm.yaml")))
    )
    assert there["tokens"] == here["tokens"]
    for name, values in there["figures"].items():
        assert values == pytest.approx(here["figures"][name], abs=1e-4)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prompt": ""}, "prompt: got an empty one with --prompt"),
        ({"prompt": "1+" * 150}, r"prompt of 303 tokens \+ max_new_tokens 8 exceeds"),
        ({"samples": 0}, "--samples: got 0, expected at least 1"),
        ({"max_length": 0}, "--max_length: got 0, expected at least 1"),
        ({"max_length": 8}, "--max_length: got 8, but the prompt and its response may have 12"),
        ({"top_p": 2.0}, "sampling.top_p: got 2.0"),
        ({"html": "nowhere/p.html"}, "--html: got 'nowhere/p.html', expected a file"),
        ({"student": "./nowhere"}, "student model: "),
        ({"ckpt_path": "lab/arithmetic/train.jsonl"}, "--ckpt_path: 'lab/"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], line: str) -> None:
    given = {"prompt": "1", "max_new_tokens": 8, **change}
    student = Student(given.pop("student", "lab/arithmetic/student"))
    trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(UserError, match=line):
        trainer.sample(GRPO(student), RolloutDataModule(engine=HFEngine()), **given)


@pytest.mark.usefixtures("in_lab")
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--config", str(CONFIGS / "opd.yaml"), *QUICK, "--prompt=1",
              "--ckpt_path=nowhere.ckpt"])  # fmt: skip
    assert ended.value.code == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert len(errors) == 1
    assert "'nowhere.ckpt'" in errors[0]


def test_a_conversation_on_a_terminal(in_lab: Path) -> None:
    """A real one: colours, a second turn, a refused line, and Ctrl-D."""
    ours, theirs = pty.openpty()
    command = ["sample", *QUICK, "--max_length=40", "--config", str(CONFIGS / "opd.yaml")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = Process(
        "opd_lightning",
        *command,
        cwd=in_lab,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    seen = ""

    def wait_for(count: int) -> None:
        nonlocal seen
        until = monotonic() + 180
        while len(re.findall(r"^> ", seen, re.MULTILINE)) < count:
            assert select.select([ours], [], [], until - monotonic())[0], seen
            seen += os.read(ours, 65536).decode()

    try:
        wait_for(1)
        for turn, line in enumerate(["1+1=", "2+2=", "3+3=" * 8, "/new", "4+4="], start=2):
            os.write(ours, f"{line}\n".encode())
            wait_for(turn)
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert (
        "tokens are coloured by log pi_T - log pi_S of the teacher lab/arithmetic/teacher" in seen
    )
    assert seen.count("mean log_ratio") == 3
    assert re.search(r"\x1b\[[\d;]*38;2;(214;69;65|38;133;196)m|48;2;(214;69;65|38;133;196)m", seen)
    assert seen.count("opd: error: a prompt of") == 1
