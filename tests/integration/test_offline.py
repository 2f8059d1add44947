"""Responses written once, scored once, trained on without a sampler or a teacher at hand."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback

from opd_lightning.cli import main
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import PromptView
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import OPD, OPSDK1, SFT, DivergenceOPD, LightningOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import CachedTeacher, FrozenTeacher, Teacher
from opd_lightning.types import Rollout
from opd_lightning.verifiers import ExactMatch
from tests.integration.test_fit import Recorder, fit

CONFIG = str(Path(__file__).parents[2] / "configs" / "lab" / "lightning_opd.yaml")
TRAIN = "lab/arithmetic/train.jsonl"

pytestmark = pytest.mark.usefixtures("in_lab")


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)


def write(
    out: Path,
    *,
    author: Literal["student", "teacher"] = "student",
    samples: int = 1,
    train: Path | str = TRAIN,
    limit: int | None = None,
    ckpt_path: str | None = None,
    **data: Any,
) -> None:
    """What the command of `folder` does, without its parser, which costs more than the writing."""
    source = RolloutDataModule(
        train=PromptSource(str(train), limit=limit),
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        sampling=Sampling(max_new_tokens=12),
        **data,
    )
    asks_nobody = SFT(Student("lab/arithmetic/student"))
    trainer().write_responses(
        asks_nobody,
        str(out),
        author=author,
        samples=samples,
        batch_size=6,
        ckpt_path=ckpt_path,
        datamodule=source,
    )


@pytest.fixture(scope="module")
def folder(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two responses to every prompt, and the teacher's scores of them, by the commands."""
    made = tmp_path_factory.mktemp("offline")
    responses = made / "responses.jsonl"
    short = ["--data.sampling.max_new_tokens=12", "--batch_size=6", "--samples=2"]
    files = [
        f"--data.train.path={responses}",
        f"--model.init_args.teacher.init_args.cache={made / 'teacher'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained_lab)
        main(["write-responses", "--config", CONFIG, f"--out={responses}",
              f"--data.train.path={TRAIN}", *short])  # fmt: skip
        main(["cache-teacher", "--config", CONFIG, *files, "--batch_tokens=200"])
    return made


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def frozen() -> FrozenTeacher:
    return FrozenTeacher("lab/arithmetic/teacher")


def cached(folder: Path, teacher: Teacher | None = None) -> CachedTeacher:
    return CachedTeacher(str(folder / "teacher"), teacher or frozen())


def train(
    method: type[OPD | DivergenceOPD],
    teacher: Teacher,
    file: Path | str,
    data: dict[str, Any] | None = None,
    **more: Any,
) -> Recorder:
    module = method(
        Student("lab/arithmetic/student"),
        teacher=teacher,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        **more,
    )
    given: dict[str, Any] = {
        "engine": None,
        "mix": RolloutMix(recorded=1),
        "train": PromptSource(str(file)),
        "samples_per_prompt": 1,
        "prompts_per_step": 8,
    }
    return fit(module, micro_batches=2, **given | (data or {}))


# Writing --------------------------------------------------------------------------------


def test_rows_are_prompts_with_exact_responses(folder: Path) -> None:
    written, asked = rows(folder / "responses.jsonl"), PromptSource(TRAIN).load()
    assert [row["id"] for row in written] == [f"{p.id}/{s}" for p in asked for s in range(2)]
    tokenizer = Student("lab/arithmetic/student").source.tokenizer
    loaded = PromptSource(str(folder / "responses.jsonl")).load()
    for row, prompt in zip(written, loaded, strict=True):
        assert prompt.response_ids == tuple(row["response_ids"])
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response"]
        ended = row["response_ids"][-1] == tokenizer.eos_token_id
        assert row["stop_reason"] == ("eos" if ended else "length")
        assert ended or len(row["response_ids"]) == 12
        assert row["reward"] in (0.0, 1.0)
    assert {row["stop_reason"] for row in written} >= {"length"}
    firsts = [tuple(row["response_ids"]) for row in written]
    assert len(set(firsts)) > len(asked)  # the samples of a prompt are not one another's


def test_writing_goes_on_where_it_was_cut(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "responses.jsonl").read_bytes()
    out = tmp_path / "responses.jsonl"
    out.write_bytes(whole[: len(whole) // 2])
    write(out, samples=2)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("length", [1, 10, -1])
def test_a_first_row_that_was_cut_is_written_again(
    folder: Path, tmp_path: Path, length: int
) -> None:
    first, *_ = (folder / "responses.jsonl").read_bytes().split(b"\n")
    out = tmp_path / "responses.jsonl"
    out.write_bytes(first[:length])
    write(out, samples=2, limit=1)
    assert rows(out) == rows(folder / "responses.jsonl")[:2]


@pytest.mark.parametrize(
    "content", ["notes", '{"id": "1", "prompt": "2+2="}', '{"id": "1", "prompt": "2+2="}\n']
)
def test_a_foreign_file_is_left_as_it_is(content: str, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text(content)
    with pytest.raises(UserError, match="not written by this command"):
        write(out)
    assert out.read_text() == content


def test_a_full_disk_keeps_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "responses.jsonl"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunStoppedError, match="--out: "):
            write(out, limit=2)
    before = rows(out)
    write(out, limit=3)
    assert rows(out)[: len(before)] == before
    assert len(rows(out)) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 1}, "but this would be"),
        ({"author": "teacher"}, "data.teacher: got nothing for --author teacher"),
        ({"samples": 0}, "--samples: got 0, expected at least 1"),
    ],
)
def test_writing_refuses(folder: Path, more: dict[str, Any], message: str) -> None:
    before = (folder / "responses.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        write(folder / "responses.jsonl", **{"samples": 2, **more})
    assert (folder / "responses.jsonl").read_bytes() == before


Lines = list[dict[str, str]]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda lines: lines.insert(0, {"messages": "1+1=", "answer": "2"}),
            {},
            r"another at .*:1",
        ),
        (lambda lines: lines[1].update(messages="1+1="), {}, r"another at .*:2"),
        (lambda lines: lines[1].update(answer="7"), {}, r"another at .*:2"),
        (lambda lines: lines.pop(), {}, "none of this id"),
        (lambda lines: None, {"samples": 1}, "none of this id"),
        (lambda lines: lines.append({"messages": "1+1=", "answer": "2"}), {}, None),
    ],
    ids=["inserted", "other question", "other answer", "removed", "fewer samples", "appended"],
)
def test_writing_goes_on_with_the_same_prompts_alone(
    change: Callable[[Lines], None], more: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    """Ids of rows without one are places in the file, so they do not tell a change."""
    train, out = tmp_path / "a.jsonl", tmp_path / "responses.jsonl"
    lines = [{"messages": f"{n}+2=", "answer": str(n + 2)} for n in range(3)]
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(out, train=train, samples=2)
    before = out.read_bytes()
    change(lines)
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if message is None:
        write(out, train=train, samples=2)
        assert out.read_bytes().startswith(before)
        assert len(rows(out)) == 8
        return
    with pytest.raises(UserError, match=message) as refused:
        write(out, train=train, **{"samples": 2, **more})
    assert re.match(rf"--out: {out}:\d answers a prompt, 'a:\d/\d', that", str(refused.value))
    assert out.read_bytes() == before


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_checkpoint_must_be_one(given: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("weights")
    (tmp_path / "folder").mkdir()
    place = str(tmp_path / given)
    out = tmp_path / "responses.jsonl"
    with pytest.raises(UserError, match="no checkpoint") as refused:
        write(out, ckpt_path=place)
    assert repr(place) in str(refused.value)


def test_weights_that_do_not_arrive_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[HFEngine] = []
    monkeypatch.setattr(HFEngine, "load_weights", lambda *_: None)
    monkeypatch.setattr(HFEngine, "close", lambda engine: closed.append(engine))
    out = tmp_path / "responses.jsonl"
    with pytest.raises(RunStoppedError, match="did not take the weights"):
        write(out)
    assert closed
    assert not out.read_bytes()


def test_the_teacher_writes_too(tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    teacher = TeacherSampler(path="lab/arithmetic/teacher", engine=HFEngine())
    write(out, author="teacher", limit=4, teacher=teacher)
    written = rows(out)
    assert len(written) == 4
    assert written[0]["written_by"].startswith("teacher opd-")


# Training -------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [None, TopK(k=8, support="teacher", normalise="tail")])
def test_u20_a_cached_teacher_trains_like_the_one_behind_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, divergence: TopK | None
) -> None:
    file = folder / "responses.jsonl"
    kind: type[OPD | DivergenceOPD] = LightningOPD if divergence is None else DivergenceOPD
    more: dict[str, Any] = {} if divergence is None else {"divergence": divergence}
    live = train(kind, frozen(), file, **more)

    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher behind the cache was loaded")

    monkeypatch.setattr("opd_lightning.teachers.frozen.load_causal_lm", no_weights)
    read = train(kind, cached(folder), file, **more)
    assert len(live.logged) == 3
    names = [n for n in live.logged[0] if n == "loss" or n.startswith(("signal/", "entropy/"))]
    assert len(names) > 5
    for theirs, ours in zip(live.logged, read.logged, strict=True):
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["optim/gradient_norm"] > 0


class FirstStep(Callback):
    """Keeps the rollouts of the first step."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 0:
            self.rollouts += batch.rollouts


def test_u20_the_first_gradient_is_that_of_opd(tmp_path: Path) -> None:
    """On the same rollouts, with the same average over responses."""
    first = FirstStep()
    student = Student("lab/arithmetic/student")
    online = OPD(student, teacher=frozen(), aggregation="seq-mean-token-mean")
    seen = fit(
        online,
        steps=1,
        micro_batches=2,
        callbacks=[first],
        prompts_per_step=8,
        samples_per_prompt=1,
    )
    written = {rollout.prompt.id: rollout.response_ids for rollout in first.rollouts}
    assert len(written) == 8
    file = tmp_path / "responses.jsonl"
    with file.open("w") as lines:
        for row in rows(Path(TRAIN)):
            row["response_ids"] = written.get(row["id"], [5])
            lines.write(json.dumps(row) + "\n")
    offline = train(LightningOPD, frozen(), file)
    assert offline.logged[0]["loss"] == pytest.approx(seen.logged[0]["loss"], abs=1e-6)
    for name, gradient in seen.gradients[0].items():
        torch.testing.assert_close(offline.gradients[0][name], gradient, atol=1e-6, rtol=1e-4)
    assert max(float(g.abs().max()) for g in seen.gradients[0].values()) > 1e-3


# Refusals -------------------------------------------------------------------------------

OTHER = "lab/arithmetic/student"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "nowhere"}, "'nowhere'"),
        ({"teacher": FrozenTeacher(OTHER)}, "teacher opd-"),
        ({"file": TRAIN}, "no 'response'"),
        (
            {"file": "lab/arithmetic/demonstrations.jsonl"},
            "demonstrations.jsonl:1: ",
        ),
        (
            {"data": {"mix": RolloutMix(recorded=0.5), "engine": "hf"}},
            "LightningOPD learns",
        ),
        ({"overlap_top_k": 20}, "but 20"),
        ({"imitation": 1.0}, "would take all of LightningOPD's responses"),
        (
            {"kind": OPD, "data": {"mix": RolloutMix(), "engine": "hf"}},
            "CachedTeacher",
        ),
        (
            {"kind": OPSDK1, "view": "corrected",
             "data": {"views": {"corrected": PromptView(template="{{ feedback }}")}}},
            "data.views: 'corrected'",
        ),
    ],
)  # fmt: skip
def test_fit_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("opd_lightning.models.student.load_causal_lm", no_weights)
    monkeypatch.setattr("opd_lightning.teachers.frozen.load_causal_lm", no_weights)
    given = {"kind": LightningOPD, "file": folder / "responses.jsonl", **change}
    place = str(given.pop("cache", folder / "teacher"))
    teacher = CachedTeacher(place, given.pop("teacher", None) or frozen())
    with pytest.raises(UserError, match=message):
        train(given.pop("kind"), teacher, given.pop("file"), **given)


def test_ids_beyond_the_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    row = rows(folder / "responses.jsonl")[0] | {"response_ids": [5, 64]}
    (tmp_path / "responses.jsonl").write_text(json.dumps(row))
    module = LightningOPD(Student("lab/arithmetic/student"), cached(tmp_path))
    data = RolloutDataModule(
        PromptSource(str(tmp_path / "responses.jsonl")), mix=RolloutMix(recorded=1)
    )
    message = "responses.jsonl:1: 'response_ids' holds token 64, but the student's vocabulary"
    with pytest.raises(UserError, match=message):
        trainer().cache_teacher(module, datamodule=data)


def test_there_must_be_something_to_cache(capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIG.replace("lightning_opd", "opd")
    with pytest.raises(SystemExit) as ended:
        main(["cache-teacher", "--config", config])
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert len(lines) == 1
    assert "it asks no CachedTeacher" in lines[0]
