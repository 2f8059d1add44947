"""Retention: likelihoods against brute force, the front by enumeration, errors in one line."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from peft import LoraConfig

from callbacks import CapabilityRetention
from callbacks.measurement import Measurement
from callbacks.pareto import ParetoFolder, Point, front
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.scores import LikelihoodScores
from opd_lightning.evaluation.texts import LikelihoodBatch, LikelihoodStream, LikelihoodSuite
from opd_lightning.methods import SFT
from opd_lightning.models.student import Student
from opd_lightning.processes import Ranks
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers.start import start_of
from opd_lightning.timing import StepTimer
from opd_lightning.verifiers import ExactMatch
from tests.conftest import TinyModelDir

TEXTS = ["7+8=15", "a", "some words, and more", "x*y", "0"]
Read = Any  # the module that reads


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [{"messages": f"q{i}", "response": text} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batches(student: Student, rows: Path, rank: int, ranks: int) -> list[LikelihoodBatch]:
    source = student.source
    prompts = PromptSource(str(rows)).load()
    renderer = Renderer(source.tokenizer, {}, {}, source.eos_ids)
    stream = LikelihoodStream(
        "texts",
        prompts,
        [renderer.plain(prompt) for prompt in prompts],
        writer=RolloutWriter({}, None, renderer, StepTimer()),
        batch_size=2,
        ranks=Ranks(rank=rank, world_size=ranks, sum=lambda n: n, gather=lambda x: [x]),
        pad_id=source.pad_id,
    )
    assert len(stream) == len(list(stream))
    return list(stream)


def reader(folder: Path, lora: LoraConfig | None = None, dtype: torch.dtype | None = None) -> Read:
    """A module with a student and its start, and no trainer."""
    module = SFT(Student(str(folder), lora=lora))
    module.student.load()
    module.start = start_of(module.student, dtype)
    module.start.load(torch.device("cpu"), module.student)
    return module.eval()


@torch.no_grad()
def read(module: Read, rows: Path, rank: int = 0, ranks: int = 1) -> LikelihoodScores:
    scores = LikelihoodScores(compares=True)
    module.suites = {"texts": LikelihoodSuite(prompts=PromptSource(str(rows)))}
    module.suite_scores = {"texts": scores}
    for index, batch in enumerate(batches(module.student, rows, rank, ranks)):
        module.validation_step(batch, index)
    return scores


def nudge(module: Read) -> None:
    with torch.no_grad():
        for parameter in module.student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )


@torch.no_grad()
def brute_force(module: Read, before: Any, rows: Path) -> dict[str, float]:
    """A text at a time, whole logits in float64."""
    source, now = module.student.source, module.student.model
    renderer = Renderer(source.tokenizer, {}, {}, source.eos_ids)
    found: list[tuple[float, float]] = []
    for prompt in PromptSource(str(rows)).load():
        head = renderer.plain(prompt)
        text = source.tokenizer.encode(prompt.response, add_special_tokens=False)
        text += [source.tokenizer.eos_token_id]
        ids = torch.tensor([head + text])
        q, p = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (now, before))
        for place, token in enumerate(text, start=len(head) - 1):
            divergence = (p[place].exp() * (p[place] - q[place])).sum()
            found.append((float(q[place, token]), float(divergence)))
    mean, divergence = (sum(column) / len(found) for column in zip(*found, strict=True))
    return {"log_likelihood": mean, "perplexity": math.exp(-mean), "kl": divergence}


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])])
def test_likelihoods_are_those_of_brute_force(
    lora: LoraConfig | None, tiny_model_dir: TinyModelDir, rows: Path
) -> None:
    module = reader(tiny_model_dir(), lora)
    before = Student(str(tiny_model_dir()))
    before.load()
    start = {name: float(value) for name, value in read(module, rows).compute().items()}
    assert start["kl"] == 0
    assert start == pytest.approx(brute_force(module, before.model, rows), rel=1e-5)
    nudge(module)
    now = {name: float(value) for name, value in read(module, rows).compute().items()}
    assert now["kl"] > 1e-3
    assert now == pytest.approx(brute_force(module, before.model, rows), rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj"])])
def test_under_autocast_both_sides_round_alike(
    lora: LoraConfig | None, tiny_model_dir: TinyModelDir, rows: Path
) -> None:
    module = reader(tiny_model_dir(), lora, torch.bfloat16)
    exact = float(read(module, rows).compute()["kl"])
    with torch.autocast("cpu", torch.bfloat16):
        assert float(read(module, rows).compute()["kl"]) == 0
    assert exact > 0  # one side rounded


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_add_up(ranks: int, tiny_model_dir: TinyModelDir, rows: Path) -> None:
    """Also where some have fewer texts than others, or none: all read equally often."""
    module = reader(tiny_model_dir())
    nudge(module)
    whole = read(module, rows)
    parts = [read(module, rows, rank, ranks) for rank in range(ranks)]
    assert len({len(batches(module.student, rows, rank, ranks)) for rank in range(ranks)}) == 1
    together = torch.stack([part.sums for part in parts]).sum(0)
    torch.testing.assert_close(together, whole.sums, atol=1e-5, rtol=0)
    assert together[0] == whole.sums[0] == sum(len(text) + 1 for text in TEXTS)


def test_without_a_start_there_is_no_divergence() -> None:
    scores = LikelihoodScores(compares=False)
    scores.update(torch.tensor([-1.0, -3.0]), torch.zeros(2))
    assert scores.compute().keys() == {"log_likelihood", "perplexity"}
    assert scores.compute()["perplexity"].item() == pytest.approx(math.exp(2))


# Deltas and the front -----------------------------------------------------------------------


def test_the_worst_ability_and_the_mean_gain() -> None:
    start = {"hard": 0.2, "harder": 0.1, "add": 0.9, "prose": -2.0}
    scores = {"hard": 0.6, "harder": 0.2, "add": 0.8, "prose": -2.05}
    found = Measurement(step=3, start=start, scores=scores, targets=["hard", "harder"])
    assert found.worst == "add"
    assert found.retention == pytest.approx(-0.1)
    assert found.gain == pytest.approx(0.25)
    assert found.figures()["retention/delta/prose"] == pytest.approx(-0.05)
    assert "| add | worst | 0.900 | 0.800 | -0.100 |" in found.table()
    still = Measurement(step=0, start=start, scores=start, targets=["hard"])
    assert (still.gain, still.retention) == (0, 0)


def test_a_bound_is_passed_and_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = iter([0.5, 0.25, 0.125])
    monkeypatch.setattr(
        "callbacks.capability_retention.measured_scores", lambda *_: {"a": 0.5, "b": next(worst)}
    )
    callback = CapabilityRetention(["a"], lower_past=0.25, lower_to=0.5, stop_past=0.25)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(
        state=state, sanity_checking=False, datamodule=None, global_step=0, should_stop=False
    )
    module: Any = SimpleNamespace(derived={}, tables={}, rate_scales={})
    seen = []
    for trainer.global_step in range(3):
        callback.on_validation_epoch_end(trainer, module)
        seen.append((dict(module.rate_scales), trainer.should_stop))
    assert seen == [({}, False), ({}, False), ({"retention": 0.5}, True)]


def point(step: int, gain: float, retention: float) -> Point:
    return Point(step=step, gain=gain, retention=retention, scores={})


def test_the_front_by_enumeration() -> None:
    """Every order of every four of nine points, some of them equal."""
    places = list(itertools.product((0.0, 0.5, 1.0), repeat=2))
    for chosen in itertools.product(places, repeat=4):
        points = [point(step, *place) for step, place in enumerate(chosen)]
        expected = [
            p
            for p in points
            if not any(
                (q.gain >= p.gain and q.retention > p.retention)
                or (q.gain > p.gain and q.retention >= p.retention)
                or ((q.gain, q.retention) == (p.gain, p.retention) and q.step < p.step)
                for q in points
            )
        ]
        assert front(points) == expected
        grown: list[Point] = []
        for p in points:  # one after another, as a run finds them
            grown = front([*grown, p])
        assert grown == expected


class Saver:
    """A trainer that can save, and no more."""

    is_global_zero = True
    global_step = 0

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        assert weights_only
        path.parent.mkdir(exist_ok=True)
        path.write_text("weights")


def test_only_the_front_stays_on_disk(tmp_path: Path) -> None:
    folder, saver = ParetoFolder(tmp_path / "pareto"), Saver()
    points: list[Point] = []
    found = {10: (0.1, -0.1), 20: (0.2, -0.05), 30: (0.1, -0.2), 40: (0.3, -0.3)}
    for step, (gain, retention) in {0: (0.0, 0.0), **found}.items():
        saver.global_step = step
        points = front([*points, point(step, gain, retention)])
        folder.keep(cast(Any, saver), points, {"targets": ["hard"]})
    names = ["index.json", "step-000020.ckpt", "step-000040.ckpt"]
    assert sorted(path.name for path in folder.folder.iterdir()) == names
    index = json.loads((folder.folder / "index.json").read_text())
    assert index["targets"] == ["hard"]
    assert [(p["step"], p["checkpoint"]) for p in index["points"]] == [
        (0, None),
        (20, names[1]),
        (40, names[2]),
    ]
    # A run that resumes from step 10 keeps later files until it reaches their steps.
    saver.global_step = 20
    folder.keep(cast(Any, saver), points[:1], {})
    assert sorted(path.name for path in folder.folder.iterdir()) == ["index.json", names[2]]


def test_the_front_of_a_repeated_last_validation_is_kept(tmp_path: Path) -> None:
    saved: list[str] = []
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        sanity_checking=False,
        is_global_zero=True,
        global_step=20,
        log_dir=str(tmp_path),
        save_checkpoint=lambda path, weights_only: saved.append(path.name),
    )
    callback = CapabilityRetention(["a"])
    callback.points = [Point(step=20, gain=0.5, retention=0.1, scores={"a": 0.5})]
    callback.on_validation_end(trainer, None)  # `on_train_start` is not called then
    assert saved == ["step-000020.ckpt"]
    assert json.loads((tmp_path / "pareto" / "index.json").read_text())["points"][0]["step"] == 20


def test_students_that_a_branch_removed_count_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After going back to a checkpoint, the front has later students instead."""
    (tmp_path / "pareto").mkdir()
    (tmp_path / "pareto" / "step-000020.ckpt").touch()
    data = SimpleNamespace(suites_of=lambda stage: {"a": None, "b": None})
    trainer: Any = SimpleNamespace(log_dir=str(tmp_path), datamodule=data)
    callback = CapabilityRetention(["a"])
    callback.baseline = {"a": 0.0, "b": 0.0}
    callback.points = [point(0, 0.0, 0.0), point(10, 0.9, -0.2), point(20, 0.5, -0.1)]
    callback.on_train_start(trainer, cast(Any, None))
    assert [one.step for one in callback.points] == [0, 20]
    assert "the students of steps 10 are gone" in capsys.readouterr().err


# Errors -------------------------------------------------------------------------------------


def refusal(
    callback: CapabilityRetention,
    limit: Any = 1.0,
    prose: LikelihoodSuite | None = None,
    **suites: EvaluationSuite,
) -> str:
    verifier = None if callback.targets == ["unverified"] else ExactMatch()
    texts = {"prose": prose} if prose else {}
    data = RolloutDataModule(validation=suites, texts=texts, verifier=verifier)
    trainer: Any = SimpleNamespace(
        datamodule=data, enable_validation=bool(limit), limit_val_batches=limit
    )
    with pytest.raises(UserError) as caught:
        callback.setup(trainer, None, "fit")
    return str(caught.value)


def test_what_cannot_be_compared_is_refused() -> None:
    hard = EvaluationSuite(prompts=PromptSource("a"))
    prose = LikelihoodSuite(prompts=PromptSource("b"))
    assert "got ['x'] of the suites ['hard', 'prose']" in refusal(
        CapabilityRetention(["x"]), hard=hard, prose=prose
    )
    assert "another to be kept" in refusal(CapabilityRetention(["hard"]), hard=hard)
    assert "got [] of" in refusal(CapabilityRetention([]), hard=hard)
    assert "has no verifier" in refusal(
        CapabilityRetention(["unverified"]), unverified=hard, prose=prose
    )
    assert "expected 1.0" in refusal(CapabilityRetention(["hard"]), limit=3, hard=hard, prose=prose)


def test_bounds_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="stop_past: got -0"):
        CapabilityRetention(["hard"], stop_past=-0.1)
    with pytest.raises(UserError, match="lower_to: got 2"):
        CapabilityRetention(["hard"], lower_to=2)
    with pytest.raises(UserError, match=r"batch_size.*got 0"):
        LikelihoodSuite(prompts=PromptSource("b"), batch_size=0)
