"""A cached teacher returns the scores of the wrapped teacher only."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_lightning.commands.cache_teacher import fill
from opd_lightning.errors import UserError
from opd_lightning.methods import LightningOPD
from opd_lightning.models.head import score as read_head
from opd_lightning.models.student import Student
from opd_lightning.teachers import (
    AdapterOffTeacher,
    ByDomainTeacher,
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    RecordedQuestion,
)
from opd_lightning.types import Author, RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.conftest import TinyModelDir

CPU = torch.device("cpu")
TEMPERATURE = 0.7


@pytest.fixture
def batch() -> RolloutBatch:
    """Three recorded responses, one of them dropped, under two views."""
    prompts = ([9, 10], [12], [9, 11])
    responses = ([7, 8, 1], [11, 1], [13, 14, 15, 1])
    return make_batch(
        [
            make_rollout(
                response,
                prompt_ids=prompt,
                views={"told": [20, *prompt]},
                author=Author.RECORDED,
                dropped=len(response) == 2,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ],
        temperature=TEMPERATURE,
    )


def questions(batch: RolloutBatch, top_k: int) -> list[RecordedQuestion]:
    return [
        RecordedQuestion(r.prompt, ids, r.response_ids, top_k)
        for r in batch.rollouts
        for ids in (r.prompt_ids, r.views["told"])
        if ids is not None
    ]


Fill = Callable[..., CachedTeacher]


@pytest.fixture
def filled(tiny_model_dir: TinyModelDir, tmp_path: Path) -> Fill:
    """Fill a cache with scores; return a teacher that has read it."""

    def make(
        asked: list[RecordedQuestion], seed: int = 1, temperature: float = TEMPERATURE
    ) -> CachedTeacher:
        frozen = FrozenTeacher(str(tiny_model_dir(seed=seed)))
        filling, reading = (CachedTeacher(str(tmp_path / "cache"), frozen) for _ in range(2))
        filling.collect_unknown()
        for teacher in (filling, reading):
            teacher.check([], temperature)
            for question in asked:
                teacher.check_question(question)
            if teacher is filling:
                student = Student(str(tiny_model_dir(seed=seed)))
                fill(filling, student=student, device=CPU, batch_tokens=12)
        return reading

    return make


@pytest.mark.parametrize("view", ["student", "told"])
def test_u20_cached_is_recomputed(
    filled: Fill, batch: RolloutBatch, view: str, tiny_model_dir: TinyModelDir
) -> None:
    cached = filled(questions(batch, top_k=5))
    frozen = FrozenTeacher(str(tiny_model_dir(seed=1)))
    frozen.load(CPU, Student("unused"))
    for top_k in (0, 3, 5):
        theirs, ours = (t.score(batch, view, top_k=top_k) for t in (frozen, cached))
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.entropy, theirs.entropy, atol=1e-6, rtol=0)
        assert (ours.top_ids == theirs.top_ids).all()
    _, known = cached.score_top(batch, view, top_k=3)
    states = frozen.states(batch, view)
    for column in range(3):
        with torch.no_grad():
            expected = read_head(states, known.ids[:, column]).student.logprobs
        torch.testing.assert_close(known.logprobs[:, column], expected, atol=1e-6, rtol=0)


def test_u20_the_advantage_moves_with_the_student(
    filled: Fill, batch: RolloutBatch, tiny_model_dir: TinyModelDir
) -> None:
    student = Student(str(tiny_model_dir()))
    student.load()
    method = LightningOPD(student, filled(questions(batch, top_k=16)))
    method.check()

    def now() -> tuple[torch.Tensor, torch.Tensor]:
        scored = method._score(batch).scored
        return method.advantage(scored), scored.student.logprobs

    advantage, logprobs = now()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    after, moved = now()
    assert (moved - logprobs).abs().max() > 1e-3
    torch.testing.assert_close(after - advantage, logprobs - moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_micro_batch_without_tokens_has_no_scores(
    filled: Fill, batch: RolloutBatch, top_k: int
) -> None:
    """One that repeats a rollout, because another rank has more micro-batches."""
    cached = filled(questions(batch, top_k=5))
    nothing = make_batch([batch.rollouts[1]], temperature=TEMPERATURE)  # the dropped one
    scores, known = cached.score_top(nothing, "student", top_k=top_k)
    assert scores.logprobs.shape == scores.entropy.shape == nothing.response_mask.shape
    assert scores.top_ids.shape == (*nothing.response_mask.shape, top_k)
    assert not scores.logprobs.any()
    assert known.ids.shape == known.logprobs.shape == (0, top_k)


def test_a_second_filling_asks_only_what_is_new(
    filled: Fill, batch: RolloutBatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = questions(batch, top_k=5)
    filled([*asked[:2], asked[0]])
    assert "0 rows are there, 2 are to be scored" in capsys.readouterr().out
    filled(asked)
    assert "2 rows are there, 4 are to be scored" in capsys.readouterr().out
    filled(asked)
    assert "6 rows are there, 0 are to be scored" in capsys.readouterr().out


def test_another_teacher_temperature_or_row_is_refused(filled: Fill, batch: RolloutBatch) -> None:
    asked = questions(batch, top_k=5)
    cached = filled(asked)
    with pytest.raises(UserError, match=r"was made with teacher opd-\w+, but this run has opd-\w+"):
        filled(asked, seed=2)
    with pytest.raises(UserError, match=r"was made with temperature 0.7, but this run has 1.0"):
        filled(asked, temperature=1.0)
    with pytest.raises(UserError, match=r"holds the 5 likeliest tokens, but 6 are asked for"):
        filled(questions(batch, top_k=6))
    other = asked[0]._replace(prompt_ids=[1])
    with pytest.raises(UserError, match=r"not in the cache .*; run `opd cache-teacher` again"):
        cached.check_question(other)


def test_the_description_is_readable(filled: Fill, batch: RolloutBatch, tmp_path: Path) -> None:
    filled(questions(batch, top_k=5))
    found = json.loads((tmp_path / "cache" / "teacher.json").read_text())
    assert found["temperature"] == TEMPERATURE
    assert found["top_k"] == 5


@pytest.mark.parametrize("teacher", [EMATeacher(), AdapterOffTeacher()])
def test_a_teacher_made_of_the_student_cannot_be_cached(teacher: EMATeacher) -> None:
    with pytest.raises(UserError, match=r"expected a teacher that has a model folder of its own"):
        CachedTeacher("cache", teacher)


def test_domains_are_asked_of_their_own_cache(tiny_model_dir: TinyModelDir) -> None:
    frozen = FrozenTeacher(str(tiny_model_dir()))
    math, code = (CachedTeacher(name, frozen) for name in ("math", "code"))
    both = ByDomainTeacher({"math": math, "code": code})
    prompt = make_rollout([1], domain="code").prompt
    assert both.responsible(prompt) is code
    assert both.parts() == [math, code]
    with pytest.raises(UserError, match="got a ByDomainTeacher"):
        CachedTeacher("cache", both)


def test_a_domain_without_rows_needs_no_cache(
    tiny_model_dir: TinyModelDir, tmp_path: Path, filled: Fill, batch: RolloutBatch
) -> None:
    code = filled(questions(batch, 0))
    math = CachedTeacher(str(tmp_path / "math"), code.teacher)  # which `fill` does not create
    prompts = [make_rollout([1], domain="code").prompt]
    ByDomainTeacher({"math": math, "code": code}).check(prompts, TEMPERATURE)
    with pytest.raises(UserError, match="no cached scores in"):
        ByDomainTeacher({"code": math}).check(prompts, TEMPERATURE)
