"""Tasks of lm-evaluation-harness: figures as its own models have them, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.evaluation.harness import library
from opd_lightning.evaluation.harness.figures import Figures
from opd_lightning.evaluation.harness.loaded_task import LoadedTask
from opd_lightning.evaluation.harness.requests import RequestEncoder
from opd_lightning.evaluation.scores import TaskScores
from opd_lightning.evaluation.statistics import wilson
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.methods import SFT
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.processes import Ranks
from opd_lightning.rollouts import HFEngine
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.timing import StepTimer
from tests.conftest import TinyModelDir
from tests.harness_tasks import ROWS, TASKS, write_tasks

Prepare = Callable[..., LoadedTask]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def reader_of(folder: Path, context_length: int | None = None) -> RequestEncoder:
    source = ModelSource(str(folder))
    return RequestEncoder(
        tokenizer=source.tokenizer,
        template_args={},
        context_length=context_length or source.context_length,
    )


@pytest.fixture
def prepare(tiny_model_dir: TinyModelDir, tasks: str) -> Prepare:
    """Return a function that prepares a task."""

    def make(
        task: str, *, folder: str = tasks, context_length: int | None = None, **settings: Any
    ) -> LoadedTask:
        reader = reader_of(tiny_model_dir(), context_length)
        named = HarnessTask(task=task, include_path=folder, **settings)
        return LoadedTask.prepare("suite", named, reader)

    return make


def validate(folder: Path, **tasks: HarnessTask) -> Any:
    """The module after it was measured."""
    module = SFT(Student(str(folder)))
    data = RolloutDataModule(tasks=tasks, engine=HFEngine())
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    return module


# The same as lm-eval's own model of transformers -----------------------------------------------


@torch.no_grad()
def test_log_likelihoods_are_those_of_transformers(
    tiny_model_dir: TinyModelDir, tasks: str
) -> None:
    module = validate(tiny_model_dir(), choice=HarnessTask(task="choice", include_path=tasks))
    scores = module.suite_scores["choice"]
    requests = scores.task.likelihood_requests
    assert len(requests) == sum(len(row["options"]) for row in ROWS)  # type: ignore[misc, arg-type]
    for reading, (nats, greedy) in zip(
        scores.task.likelihood_requests, scores.read.tolist(), strict=True
    ):
        ids = torch.tensor([reading.context_ids + reading.text_ids])
        logits = module.student.model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(reading.context_ids) - 1
        predicted = logits[start : start + len(reading.text_ids)]
        expected = predicted.gather(1, torch.tensor(reading.text_ids)[:, None]).sum()
        assert nats == pytest.approx(float(expected), abs=1e-5)
        assert bool(greedy) is (predicted.argmax(-1).tolist() == reading.text_ids)


@pytest.mark.parametrize(("examples", "chat"), [(0, False), (2, True)])
def test_a_task_comes_out_as_from_lm_eval_itself(
    examples: int, chat: bool, tiny_model_dir: TinyModelDir, tasks: str
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    settings: dict[str, Any] = {"include_path": tasks, "num_fewshot": examples,
                                "apply_chat_template": chat}  # fmt: skip
    folder = tiny_model_dir()
    given = {name: HarnessTask(task=name, **settings) for name in TASKS}
    module = validate(folder, **given)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")
    for name in TASKS:
        loaded = library.load(name, tasks)
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", examples)
            task.set_fewshot_seed(library.EXAMPLES_SEED)
        found: Any = evaluate(lm=theirs, task_dict=loaded, apply_chat_template=chat,
                              fewshot_as_multiturn=True)  # fmt: skip
        figures = {key.partition(",")[::2]: v for key, v in found["results"][name].items()}
        ours = module.suite_scores[name]
        for (metric, kind), value in figures.items():
            if kind and value != "N/A":
                plain = metric if kind == "none" else f"{metric}.{kind}"
                plain = plain.replace("_stderr.first", ".first_stderr")
                plain = plain.replace("_stderr.whole", ".whole_stderr")
                assert module.scores[f"val/{name}/{plain}"] == pytest.approx(value, rel=1e-5), plain
        rows = found["samples"][name]
        answers = [answer[0] for row in rows[: len(ROWS)] for answer in row["resps"]]
        if name == "writing":
            written = [
                w.cut(
                    ours.task._recorded.tokenizer.decode(
                        line[1 : 1 + line[0]], skip_special_tokens=True
                    )
                )
                for w, line in zip(
                    ours.task.generation_requests, ours.written.tolist(), strict=True
                )
            ]
            assert written == answers
            assert any(written)
        elif name == "choice":
            torch.testing.assert_close(
                ours.read, torch.tensor(answers, dtype=torch.float64), atol=1e-4, rtol=0
            )


def test_a_text_longer_than_the_context_is_read_in_windows(prepare: Prepare) -> None:
    """Every token once, the first after the prefix; all tokens of a window have their places."""
    exam = prepare("rolling", context_length=16)
    whole = prepare("rolling")
    parts, texts = (
        [i for r in one.likelihood_requests for i in r.text_ids] for one in (exam, whole)
    )
    assert parts == texts
    assert len(exam.likelihood_requests) > len(whole.likelihood_requests) == len(ROWS)
    assert max(len(r.context_ids) + len(r.text_ids) for r in exam.likelihood_requests) == 16
    graded = exam.grade([(-1.0, False)] * len(exam.likelihood_requests), [])
    bytes_read = sum(len(str(row["text"])) for row in ROWS)
    assert graded["bits_per_byte"] == pytest.approx(
        len(exam.likelihood_requests) / bytes_read / math.log(2), rel=1e-6
    )
    assert graded["score"] == -graded["bits_per_byte"]


def test_contexts_are_cut_on_the_left(prepare: Prepare) -> None:
    exams = [prepare("choice", context_length=n) for n in (14, 256)]
    short, long = (exam.likelihood_requests for exam in exams)
    assert [r.text_ids for r in short] == [r.text_ids for r in long]
    for cut, full in zip(short, long, strict=True):
        room = 14 - len(full.text_ids)
        assert cut.context_ids == full.context_ids[-room:]
    too_long = [len(full.context_ids) + len(full.text_ids) > 14 for full in long]
    assert [exam.shortened for exam in exams] == [sum(too_long), 0] != [0, 0]


# Ranks ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_are_one(ranks: int, prepare: Prepare, tiny_model_dir: TinyModelDir) -> None:
    """Also where some are asked less than others, or nothing: all read equally often."""
    module = SFT(Student(str(tiny_model_dir())))
    module.student.load()
    exam = prepare("choice", limit=3)
    source = module.student.source
    renderer = Renderer(source.tokenizer, {}, {}, source.eos_ids)
    alone, together = TaskScores(exam), TaskScores(exam)
    lengths = set()
    for world, scores in ((1, alone), (ranks, together)):
        for rank in range(world):
            bench: Any = SimpleNamespace(
                source=source,
                writer=lambda verifier: RolloutWriter({}, None, renderer, StepTimer()),
                engines=None,
                seed=0,
                ranks=Ranks(rank=rank, world_size=world, sum=lambda n: n, gather=lambda x: [x]),
            )
            suite = HarnessTask(task="choice", batch_size=2)
            stream = suite.stream("suite", exam, bench)
            mine = TaskScores(exam)
            module.suites, module.suite_scores = {"suite": suite}, {"suite": mine}
            batches = list(stream)
            assert len(batches) == len(stream)
            assert sum(batch.rows for batch in batches) == stream.rows
            for index, batch in enumerate(batches):
                module.validation_step(batch, index)
            scores.read += mine.read
            lengths.add((world, len(batches)))
    assert len(lengths) == len({1, ranks})
    torch.testing.assert_close(together.read, alone.read, atol=1e-5, rtol=0)
    assert (alone.read[:, 0] < 0).all()


# Figures ----------------------------------------------------------------------------------------


def results(**figures: float) -> dict[str, Any]:
    directions = {"acc": True, "perplexity": False, "brier_score": False, "odd": None}
    return {
        "results": {"t": {"alias": "t", "sample_len": 7, **figures}},
        "higher_is_better": {"t": directions},
        "group_subtasks": {},
    }


def test_a_score_is_better_the_higher_it_is() -> None:
    found = Figures.of(
        results(**{"acc,none": 0.5, "acc_stderr,none": 0.1, "perplexity,none": math.e,
                   "brier_score,none": 0.25, "perplexity_stderr,none": 1.0}),
        "t",
    )  # fmt: skip
    assert found.choose(None) == "acc"
    assert found.documents == 7
    acc = found.judged_by("acc")
    assert acc["score"] == 0.5
    assert 0.304 < acc["score_low"] < 0.5 < acc["score_high"] < 0.696  # narrower than 1.96 errors
    assert acc["brier_score"] == 0.25
    assert found.judged_by("brier_score")["score"] == -0.25
    assert "score_low" not in found.judged_by("brier_score")
    perplexity = found.judged_by("perplexity")
    assert perplexity["score"] == pytest.approx(-1)
    reach = 1.96 / math.e  # of the logarithm
    assert perplexity["score_low"] == pytest.approx(-1 - reach)
    assert perplexity["score_high"] == pytest.approx(-1 + reach)


@pytest.mark.parametrize(
    ("share", "error", "trials"), [(0.98, 0.02, 49), (1.0, 0.0, 7), (0.0, 0.0, 7)]
)
def test_the_interval_of_a_share_is_wilson_s(share: float, error: float, trials: int) -> None:
    """If all documents are correct the error is 0, and the number of documents is used."""
    given = results(**{"acc,none": share, "acc_stderr,none": error})
    found = Figures.of(given, "t").judged_by("acc")
    expected = [float(bound) for bound in wilson(torch.tensor(share).double(), trials)]
    assert [found["score_low"], found["score_high"]] == pytest.approx(expected)
    assert 0 <= found["score_low"] <= share <= found["score_high"] <= 1
    assert found["score_low"] < found["score_high"]


def test_of_several_metrics(prepare: Prepare) -> None:
    assert prepare("choice").metric == "acc_norm"
    assert prepare("choice", metric="acc").metric == "acc"
    assert prepare("writing").metric == "exact_match.first"
    assert prepare("writing", metric="exact_match.whole").metric == "exact_match.whole"


def test_a_group_is_judged_by_its_members(prepare: Prepare) -> None:
    exam = prepare("both", limit=2)
    assert (exam.metric, len(exam.generation_requests), len(exam.likelihood_requests)) == (
        "acc",
        2,
        6,
    )
    likelihoods = [(0.0 if i % 3 == 0 else -9.0, False) for i in range(6)]
    graded = exam.grade(likelihoods, [[], []])
    assert graded["score"] == graded["score/choice"] == 0.5


def test_nobody_hears_or_notices_it(prepare: Prepare, capfd: pytest.CaptureFixture[str]) -> None:
    prepare("choice")  # the first use in a process builds and writes the model
    capfd.readouterr()
    before = torch.get_rng_state()
    exam = prepare("choice", num_fewshot=2)
    exam.grade([(-1.0, False)] * len(exam.likelihood_requests), [])
    assert torch.equal(torch.get_rng_state(), before)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


# Errors -----------------------------------------------------------------------------------------


def refusal(prepare: Prepare, *args: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_is_one_line(prepare: Prepare, tmp_path: Path) -> None:
    line = refusal(prepare, "choice", folder="nowhere")
    assert line == "data.tasks.suite: include_path: got 'nowhere', expected a folder of tasks"
    line = refusal(prepare, "choice", metric="f1")
    assert "metric: got 'f1', expected one of acc, acc_norm" in line
    line = refusal(prepare, "writing", context_length=12)
    assert "got answers of up to 12 tokens for the student's context of 12" in line
    (tmp_path / "beams").mkdir()
    beams = write_tasks(tmp_path / "beams", generation_kwargs={"until": [], "num_beams": 4})
    assert "got generation_kwargs 'num_beams'" in refusal(prepare, "writing", folder=beams)
    (tmp_path / "fixed").mkdir()
    fixed = write_tasks(tmp_path / "fixed", num_fewshot=0)
    assert "is made for 0" in refusal(prepare, "choice", folder=fixed, num_fewshot=1)
    (tmp_path / "gone").mkdir()
    gone = write_tasks(tmp_path / "gone")
    (tmp_path / "gone" / "rows.jsonl").unlink()
    line = refusal(prepare, "choice", folder=gone)
    assert "data.tasks.suite: cannot load 'choice': FileNotFoundError" in line


def test_what_is_written_needs_an_engine(tiny_model_dir: TinyModelDir, tasks: str) -> None:
    module = SFT(Student(str(tiny_model_dir())))
    writing = HarnessTask(task="writing", include_path=tasks)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(UserError, match=r"data\.engine: got nothing, but responses must be"):
        trainer.validate(module, datamodule=RolloutDataModule(tasks={"quiz": writing}))
    assert module.student.model is None


def test_a_task_is_measured_whole(tiny_model_dir: TinyModelDir, tasks: str) -> None:
    def run(**limit: Any) -> None:
        module = SFT(Student(str(tiny_model_dir())))
        choice = HarnessTask(task="choice", include_path=tasks, batch_size=4)
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **limit)
        trainer.validate(module, datamodule=RolloutDataModule(tasks={"quiz": choice}))

    with pytest.raises(UserError, match=r"got 2, but suite 'quiz' of 4 batches is graded as a wh"):
        run(limit_val_batches=2)
    with pytest.raises(UserError, match=r"got 0\.2, which is none of the 4 batches of suite"):
        run(limit_val_batches=0.2)
    run(limit_val_batches=4)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="limit of a task: got 0, expected at least 1"):
        HarnessTask(task="choice", limit=0)
    with pytest.raises(UserError, match="num_fewshot of a task: got -1"):
        HarnessTask(task="choice", num_fewshot=-1)


def test_without_the_harness(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    assert 'pip install -e ".[lm-eval]"' in refusal(prepare, "choice")


@pytest.mark.slow
def test_tasks_that_come_with_the_harness(prepare: Prepare) -> None:
    """All are listed, which takes time; their data are at a hub that tests do not reach."""
    assert "got 'nonsense', which lm-eval does not know" in refusal(prepare, "nonsense")
    assert "cannot load 'hellaswag'" in refusal(prepare, "hellaswag")
    assert "stands for several tasks" in refusal(prepare, "ai2_arc")
