"""`opd check`: a good configuration gives no warning, every planted fault gives its finding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from peft import LoraConfig
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from callbacks import EMATeacherUpdate
from opd_lightning.cli import main
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import NotReadyError
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import OPD, DivergenceOPD
from opd_lightning.models.causal_lm import Dtype
from opd_lightning.models.head import TopLogprobs
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.preflight.memory import student_bytes
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import EMATeacher, FrozenTeacher, Teacher, TopKTeacher
from opd_lightning.teachers.local import OwnModelTeacher
from opd_lightning.teachers.start import start_of
from opd_lightning.types import Completion, RolloutBatch, TokenScores
from opd_lightning.verifiers import ExactMatch
from tests.servers import RunningServer

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = str(CONFIGS / "lab" / "opd.yaml")
STUDENT = "lab/arithmetic/student"
SMALL = (
    "--data.sampling.max_new_tokens=8",
    "--data.prompts_per_step=8",
    "--samples=4",
    "--trainer.logger=false",
)

Check = Callable[..., dict[str, Any]]
Look = Callable[..., dict[str, Any]]
Findings = dict[str, dict[str, Any]]


@pytest.fixture
def check(in_lab: Path, sound_teacher: str, capfd: pytest.CaptureFixture[str]) -> Check:
    """Run `opd check --json` with changes; return its output and exit code."""

    def run(*changes: str, config: str = CONFIG) -> dict[str, Any]:
        if config == CONFIG:
            changes = (f"--model.init_args.teacher.init_args.path={sound_teacher}", *changes)
        code = 0
        try:
            main(["check", "--config", config, *SMALL, "--json", *changes])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert code == (0 if printed["ready"] else 1)
        return printed

    return run


@pytest.fixture
def look(in_lab: Path, sound_teacher: str, capfd: pytest.CaptureFixture[str]) -> Look:
    """Check a run like that of `CONFIG`, made in Python: the parser costs more than a check."""

    def run(
        kind: type[OPD | DivergenceOPD] = OPD,
        *,
        student: str | Path = STUDENT,
        teacher: str | Path | Teacher = sound_teacher,
        lora: LoraConfig | None = None,
        dtype: Dtype = "float32",
        max_logprob_gap: float = 1e-4,
        trainer: dict[str, Any] | None = None,
        **data: Any,
    ) -> dict[str, Any]:
        lightning = Trainer(
            accelerator="cpu",
            **{"max_steps": 200, "logger": False, "enable_progress_bar": False, **(trainer or {})},
        )
        asked = teacher if isinstance(teacher, Teacher) else FrozenTeacher(str(teacher))
        module = kind(
            Student(str(student), lora=lora),
            asked,
            optimizer=lambda p: torch.optim.AdamW(p, lr=2.5e-3),
            lr_scheduler=lambda o: OneCycleLR(o, max_lr=2.5e-3, total_steps=200),
            max_logprob_gap=max_logprob_gap,
        )
        given: dict[str, Any] = {
            "train": PromptSource("lab/arithmetic/train.jsonl"),
            "engine": HFEngine(dtype=dtype),
            "verifier": ExactMatch(ANSWER_PATTERN),
            "sampling": Sampling(max_new_tokens=8),
            "prompts_per_step": 8,
        }
        ready = True
        try:
            lightning.check(module, RolloutDataModule(**given | data), samples=4, json=True)
        except NotReadyError:
            ready = False
        printed: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert printed["ready"] is ready
        return printed

    return run


@pytest.fixture(scope="module")
def sound(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model close to the student; a random one would be too different."""
    folder = tmp_path_factory.mktemp("teacher") / "sound"
    return changed_weights(folder, lambda weight: weight * 1.02, untrained_lab)


@pytest.fixture
def sound_teacher(sound: str, tmp_path: Path) -> str:
    """Return a copy of it, which a test may change."""
    return str(shutil.copytree(sound, tmp_path / "sound"))


def changed_weights(folder: Path, change: Callable[[Tensor], Tensor], lab: Path = Path()) -> str:
    shutil.copytree(lab / STUDENT, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(change(parameter))
    model.save_pretrained(folder)
    return str(folder)


def not_ok(printed: dict[str, Any]) -> dict[str, str]:
    return {f["subject"]: f["level"] for f in printed["findings"] if f["level"] != "ok"}


def by_subject(printed: dict[str, Any]) -> Findings:
    return {f["subject"]: f for f in printed["findings"]}


# Good ----------------------------------------------------------------------------------


def test_a_good_configuration(check: Check) -> None:
    printed = check()
    assert not not_ok(printed)
    assert printed["verdict"] == "Ready to train."
    findings = by_subject(printed)
    assert findings["engine and trainer"]["values"]["gap_mean"] < 1e-5
    assert findings["itself as teacher"]["values"]["d_max"] == 0
    assert findings["itself as teacher"]["values"]["gradient_norm"] == 0
    assert findings["weight push"]["values"]["gap_to_pushed"] < 1e-5
    assert findings["tokens (estimate)"]["values"]["rollouts"] == 8
    seconds = findings["time (estimate)"]["values"]
    assert seconds["push_seconds"] > 0
    assert sum(seconds.values()) == pytest.approx(2 * seconds["step_seconds"])
    assert findings["memory (estimate)"]["values"]["program_bytes"] > 2**28  # libraries alone


def test_a_budget_of_positions_is_reckoned_with(look: Look) -> None:
    """Eight rollouts of 11 to 19 positions: two or three in a micro-batch."""
    findings = by_subject(look(max_tokens_per_micro_batch=40))
    assert findings["tokens (estimate)"]["values"]["micro_batches"] in (3, 4)
    assert "at most 40 positions" in findings["tokens (estimate)"]["found"]


def test_a_good_run_made_in_python(look: Look) -> None:
    """What the faults below are planted in."""
    printed = look()
    assert not not_ok(printed)
    assert by_subject(printed).keys() >= {"weight push", "seeds", "teacher", "time (estimate)"}


@pytest.mark.slow  # an engine's start, for what is like the other engine
@pytest.mark.vllm
def test_a_good_configuration_on_vllm(check: Check) -> None:
    printed = check("--config", str(CONFIGS / "engine" / "vllm.yaml"))
    assert not not_ok(printed)
    assert by_subject(printed)["weight push"]["values"]["gap_to_pushed"] < 1e-5


def test_several_processes_are_checked_in_one(look: Look) -> None:
    two = {"strategy": "ddp", "devices": 2}
    assert not not_ok(look(trainer=two))
    found = by_subject(look(trainer=two, prompts_per_step=7))
    assert "7 for 2 processes" in found["step"]["found"]


def test_a_sharded_run_cannot_put_its_teacher_aside(check: Check) -> None:
    printed = check(
        *("--config", str(CONFIGS / "strategy" / "fsdp2.yaml"), "--trainer.accelerator=cpu"),
        "--model.init_args.teacher.init_args.offload=true",
    )
    assert "this run shards its models" in by_subject(printed)["data"]["found"]


def test_a_table_for_people(
    in_lab: Path,
    sound_teacher: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    teacher = f"--model.init_args.teacher.init_args.path={sound_teacher}"
    logger = f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}"
    main(["check", "--config", CONFIG, *SMALL[:3], teacher, logger])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip() == "Ready to train."
    assert max(map(len, lines)) <= 80
    assert not (tmp_path / "run").exists(), "a check leaves the run folder alone"


@pytest.mark.parametrize(
    "name", ["sft", "sg_opd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdpo", "seqkd"))]
)
def test_methods_with_other_authors_and_views(name: str, check: Check) -> None:
    printed = check(config=str(Path(CONFIG).with_name(f"{name}.yaml")))
    assert printed["ready"]
    # Random models solve nothing, and find one another's text unlikely.
    assert not_ok(printed).keys() <= {"precision", "teacher", "rewards", "demonstrations"}
    assert by_subject(printed)["alignment"]["level"] == "ok"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
                     marks=pytest.mark.slow),
        ("gemma4_text", {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32,
                         "intermediate_size": 64, "hidden_size_per_layer_input": 0}),
    ],
)  # fmt: skip
def test_families_that_name_their_sizes_otherwise(
    kind: str, settings: dict[str, Any], look: Look, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(STUDENT, folder)
    ids = {"vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = CONFIG_MAPPING[kind](**settings, **ids, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    printed = look(student=folder, teacher=folder)
    assert not_ok(printed) == {"teacher": "warning"}, "there is nothing to learn from itself"
    assert by_subject(printed)["memory (estimate)"]["values"]["activations_bytes"] > 0


# Planted faults --------------------------------------------------------------------------


def test_an_engine_that_takes_no_weights(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(engine: HFEngine, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        engine.version = version

    monkeypatch.setattr(HFEngine, "load_weights", forget)
    assert not_ok(look()) == {"weight push": "error"}


Weights = Iterable[tuple[str, Tensor]]


def suppressed(engine: HFEngine, weights: Weights) -> None:
    for _ in weights:
        pass


def half_done(engine: HFEngine, weights: Weights) -> None:
    for name, weight in weights:
        if "layers.0" not in name:
            engine._model.get_parameter(name).copy_(weight)


def foreign(engine: HFEngine, weights: Weights) -> None:
    for name, weight in weights:
        engine._model.get_parameter(name).copy_(1.2 * weight)


def permuted(engine: HFEngine, weights: Weights) -> None:
    """The one fault that sums cannot see."""
    for name, weight in weights:
        engine._model.get_parameter(name).copy_(weight.roll(1, 0))


BF16: dict[str, Any] = {
    "trainer": {"precision": "bf16-mixed"},
    "dtype": "bfloat16",
    "max_logprob_gap": 0.1,
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize(
    ("sums", "lora", "faults"),
    [
        (True, None, (suppressed, permuted)),
        (False, None, (half_done, foreign)),
        pytest.param(False, LORA, (suppressed, half_done), marks=pytest.mark.slow),
    ],
    ids=["sums", "no sums", "lora without sums"],
)
def test_pushes_in_bfloat16(
    sums: bool,
    lora: LoraConfig | None,
    faults: Sequence[Callable[[HFEngine, Weights], None]],
    look: Look,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first push, of the initial weights, is right; the next one is of the noisy student."""
    if not sums:
        monkeypatch.setattr(HFEngine, "weight_sums", lambda engine: [])
    sound = by_subject(look(lora=lora, **BF16))["weight push"]
    assert sound["level"] == ("ok" if sums else "info")
    assert sound["values"]["gap_to_pushed"] < sound["values"]["gap_to_old"] / 10

    load = HFEngine.load_weights
    for wrong in faults:

        @torch.no_grad()
        def load_wrong(
            engine: HFEngine,
            version: int,
            weights: Weights,
            wrong: Callable[[HFEngine, Weights], None] = wrong,
        ) -> None:
            if version:
                wrong(engine, weights)
                engine.version = version
            else:
                load(engine, version, weights)

        monkeypatch.setattr(HFEngine, "load_weights", load_wrong)
        found = by_subject(look(lora=lora, **BF16))
        push = found["weight push"]
        assert push["level"] in ("error", "warning"), wrong
        assert push["level"] == "error" or wrong is half_done, wrong
        proved = sums and wrong is not permuted
        assert ("the engine holds other weights" in push["found"]) == proved, wrong
        assert "time (estimate)" in found, "a push that fails does not end the check"


def test_an_engine_of_another_model(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def shift(engine: HFEngine, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(engine._model.named_parameters())
        for name, weight in weights:
            parameters[name].copy_(1.2 * weight)
        engine.version = version

    monkeypatch.setattr(HFEngine, "load_weights", shift)
    finding = by_subject(look())["weight push"]
    assert finding["level"] == "error"
    assert "the engine holds other weights" in finding["found"]
    # An engine without sums of its weights is checked by its log-probs.
    monkeypatch.setattr(HFEngine, "weight_sums", lambda engine: [])
    finding = by_subject(look())["engine and trainer"]
    assert finding["level"] == "error"
    assert "max_logprob_gap" in finding["change"]


def test_an_engine_that_ignores_seeds(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = HFEngine.generate
    calls = iter(range(1000))

    def drift(engine: HFEngine, requests: Sequence[Request], how: Sampling) -> list[Completion]:
        by = next(calls)
        return generate(engine, [Request(r.prompt_ids, r.seed + by) for r in requests], how)

    monkeypatch.setattr(HFEngine, "generate", drift)
    assert not_ok(look()) == {"seeds": "warning"}


def test_a_student_that_trains_otherwise_than_it_is_read(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Student.load

    def noisy(student: Student) -> None:
        fresh = student.model is None
        load(student)
        if fresh:
            layer = student.model.model.layers[0].mlp
            layer.register_forward_hook(
                lambda mlp, inputs, output: output + 0.1 if mlp.training else output
            )

    monkeypatch.setattr(Student, "load", noisy)
    assert by_subject(look())["itself as teacher"]["level"] == "error"


def test_a_teacher_with_more_padding(look: Look, sound_teacher: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(sound_teacher)
    model.resize_token_embeddings(80, mean_resizing=False)
    model.save_pretrained(sound_teacher)
    printed = look()
    assert not_ok(printed) == {"vocabulary padding": "info"}
    assert "64 rows, the teacher's 80" in by_subject(printed)["vocabulary padding"]["found"]
    assert not_ok(look(DivergenceOPD))["models"] == "error"


def test_a_student_that_ends_elsewhere(look: Look, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student)
    config = json.loads((student / "generation_config.json").read_text())
    (student / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 9]}))
    printed = look(student=student)
    assert not_ok(printed) == {"end of a response": "warning"}
    (student / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [9]}))
    tokens = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps(tokens | {"eos_token": "<|pad|>"}))
    printed = look(student=student)
    assert "model.student.eos_tokens" in by_subject(printed)["models"]["found"]


@pytest.mark.parametrize(
    ("old", "new", "level", "words"),
    [
        ("'<|assistant|>' -}}{%- endif -%}", "'<|assistant|>#' -}}{%- endif -%}", "warning",
         "the prompt ends in '#' where"),
        ("+ message.content", "+ ('()' if message.role == 'assistant' else '') + message.content",
         "info", "it writes '()' before a reply"),
        ("message.content + '<|end|>'", "message.content + '<|unknown|>'", "warning",
         "closes a reply with <|unknown|> (2)"),
        ("{%- for message", "{%- if messages | length > 1 -%}{{ raise_exception('no') }}"
         "{%- endif -%}{%- for message", "warning", "refuses a whole conversation"),
    ],
)  # fmt: skip
def test_a_template_at_odds_with_itself(
    old: str, new: str, level: str, words: str, look: Look, sound_teacher: str, tmp_path: Path
) -> None:
    shutil.copytree(STUDENT, tmp_path / "student")
    for folder in (tmp_path / "student", Path(sound_teacher)):
        template = (folder / "chat_template.jinja").read_text()
        assert old in template
        (folder / "chat_template.jinja").write_text(template.replace(old, new))
    printed = look(student=tmp_path / "student")
    assert not_ok(printed) == {"chat template": level}
    assert words in by_subject(printed)["chat template"]["found"]


def test_a_prompt_that_is_too_long(look: Look, tmp_path: Path) -> None:
    row = {"messages": "1+" * 150, "answer": "1"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    printed = look(train=PromptSource(str(tmp_path / "long.jsonl")))
    assert not_ok(printed) == {"set-up": "error", "numbers": "info"}
    assert "long.jsonl:1: prompt of 303 tokens" in by_subject(printed)["set-up"]["found"]


def test_several_mistakes_at_once(check: Check) -> None:
    printed = check("--trainer.precision=bf16-true", "--trainer.accumulate_grad_batches=64",
                    "--data.verifier=null", "--data.mix={recorded: 0.5}")  # fmt: skip
    assert {"trainer", "step", "data"} <= {k for k, v in not_ok(printed).items() if v == "error"}
    assert by_subject(printed)["chat template"]["level"] == "ok", "it depends on none of these"


def test_a_teacher_of_something_else(look: Look, tmp_path: Path) -> None:
    path = changed_weights(tmp_path / "other", lambda weight: 4 * weight.flip(0))
    assert not_ok(look(teacher=path)) == {"teacher": "warning"}


def test_a_teacher_that_is_the_student(look: Look) -> None:
    printed = look(teacher=STUDENT)
    assert not_ok(printed) == {"teacher": "warning"}
    assert "nothing to learn" in by_subject(printed)["teacher"]["meaning"]


def test_a_teacher_that_overflows(look: Look, tmp_path: Path) -> None:
    path = changed_weights(tmp_path / "broken", lambda weight: weight * torch.nan)
    assert not_ok(look(teacher=path)) == {"weights": "error"}


def test_a_schedule_that_is_too_short(look: Look) -> None:
    assert not_ok(look(trainer={"max_steps": 300})) == {"optimiser": "error"}


# A teacher elsewhere -----------------------------------------------------------------------


class TeacherElsewhere(TopKTeacher):
    """Answers as a server with (perhaps) other weights than its folder's would."""

    def __init__(self, path: str, off_by: float) -> None:
        self.inside = FrozenTeacher(path)
        self.source = ModelSource(path, role="teacher")
        self.off_by = off_by

    def load(self, device: torch.device, student: Student) -> None:
        self.inside.load(device, student)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        scores = self.inside.score(batch, view, top_k=top_k)
        return replace(scores, logprobs=scores.logprobs - self.off_by * batch.response_mask)

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        raise NotImplementedError


@pytest.mark.parametrize(("off_by", "level"), [(0.0, "ok"), (0.5, "warning")])
def test_a_teacher_elsewhere_is_compared_with_its_folder(
    off_by: float, level: str, look: Look, sound_teacher: str
) -> None:
    printed = look(teacher=TeacherElsewhere(sound_teacher, off_by))
    assert by_subject(printed)["teacher from disk"]["level"] == level


@pytest.mark.vllm
def test_a_teacher_behind_a_server(check: Check, teacher_server: RunningServer) -> None:
    teacher = "--model.init_args.teacher.init_args"
    remote = (
        *("--config", str(CONFIGS / "teacher" / "remote.yaml")),
        f"{teacher}.servers=[{teacher_server.address_file}]",
        f"{teacher}.key_file={teacher_server.key_file}",
    )
    printed = check(*remote, f"{teacher}.path=lab/arithmetic/teacher")
    other = check(*remote, f"{teacher}.path=lab/arithmetic/student")
    # It is untrained, so low log-probs are the only finding.
    assert not_ok(printed).keys() <= {"teacher"}
    assert by_subject(printed)["teacher from disk"]["values"]["gap_max"] < 1e-4
    assert not_ok(other) == {"models": "error", "numbers": "info"}


def test_from_python_errors_raise(in_lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    with pytest.raises(NotReadyError, match="1 error"):
        trainer.check(
            OPD(Student(STUDENT), FrozenTeacher(STUDENT)),
            RolloutDataModule(None, HFEngine()),
        )
    assert "data.train: got nothing" in capsys.readouterr().out


# Cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
    ],
)
def test_memory_of_the_student_is_counted_exactly(
    lora: LoraConfig | None, kind: Any, options: dict[str, Any], in_lab: Path
) -> None:
    student = Student(STUDENT, lora=lora)
    student.load()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=0.1, **options)
    counted = student_bytes(student.parameters(), optimizer)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    assert counted["weights"] == measured(student.parameters())
    assert counted["gradients"] == measured(p.grad for p in trained)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert counted["optimizer"] == measured(states)


def measured(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def test_memory_of_copies_of_the_student_is_counted_exactly(look: Look) -> None:
    """A start that validations compare with, and a running average."""
    student = Student(STUDENT)
    student.load()
    start, average = start_of(student, None), EMATeacher()
    assert isinstance(start, OwnModelTeacher)
    for copy in (start, average):
        copy.load(torch.device("cpu"), student)
    texts = {"sums": LikelihoodSuite(prompts=PromptSource("lab/arithmetic/demonstrations.jsonl"))}
    lora = LoraConfig(r=2, target_modules="all-linear")
    cases: list[tuple[dict[str, Any], int]] = [
        ({"texts": texts}, measured(start.model().parameters())),
        ({"texts": texts, "lora": lora}, 0),
        ({}, 0),
    ]
    for changes, expected in cases:
        values = by_subject(look(**changes))["memory (estimate)"]["values"]
        assert values["start_bytes"] == expected
    moved = {"callbacks": [EMATeacherUpdate()]}
    found = by_subject(look(teacher=EMATeacher(), trainer=moved))
    values = found["memory (estimate)"]["values"]
    assert values["teachers_bytes"] == measured(average.model().parameters())


@pytest.mark.parametrize(
    "rank", [*(pytest.param(rank, marks=pytest.mark.slow) for rank in (None, 0)), 1]
)
def test_one_of_several_processes_looks(
    in_lab: Path,
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run with and without other processes."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    overlay = ["--config", str(CONFIGS / "strategy" / "ddp.yaml")]
    main(["check", "--config", CONFIG, *overlay, *SMALL])
    assert capsys.readouterr().out.count("Ready to train.") == (rank != 1)
