"""Best of several responses of the teacher: by reward, then by the student's likelihood."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from opd_lightning.data.best_of import keep_best, tied_best
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.errors import UserError
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine
from opd_lightning.training.scoring import mean_logprobs
from opd_lightning.types import Author, Rollout, RolloutBatch
from tests.batches import make_batch, make_rollout
from tests.conftest import TinyModelDir
from tests.streams import Run, plain

HALF = RolloutMix(teacher=0.5)


def teachers(group: int, *rewards: float) -> list[Rollout]:
    return [
        make_rollout([5, 6, 2], reward=reward, author=Author.TEACHER, group=group)
        for reward in rewards
    ]


def test_the_best_has_the_highest_reward_then_the_highest_likelihood() -> None:
    rollouts = [
        *teachers(0, 0.0, 1.0, 1.0),
        *teachers(1, math.nan, 0.2, 0.1),
        *teachers(2, math.nan, math.nan),
        make_rollout([7, 2], reward=0.0, group=3),
    ]
    assert tied_best(rollouts) == {0: [1, 2], 1: [4], 2: [6, 7]}
    kept = keep_best(rollouts, {1: -2.0, 2: -0.5, 6: -1.0, 7: -1.0})
    assert [i for i, one in enumerate(kept) if not one.dropped] == [2, 4, 6, 8]
    assert not any(one.dropped for one in rollouts)


def by_length(batches: Sequence[RolloutBatch]) -> list[float]:
    """A student that finds long responses likely."""
    return [float(len(r.response_ids)) for batch in batches for r in batch.rollouts]


def of_teacher(batches: Sequence[RolloutBatch]) -> dict[int, list[Rollout]]:
    found: dict[int, list[Rollout]] = {}
    for rollout in (r for batch in batches for r in batch.rollouts):
        if rollout.author is Author.TEACHER:
            found.setdefault(rollout.group, []).append(rollout)
    return found


def test_a_step_keeps_one_response_of_the_teacher_a_prompt() -> None:
    run = Run(mix=HALF, teacher_samples=4, likelihoods=by_length)
    batches = run.steps(2)
    groups = of_teacher(batches)
    assert len(groups) == 2 * 2  # half of 4 prompts, two steps
    for rollouts in groups.values():
        assert len(rollouts) == 4
        (kept,) = [r for r in rollouts if not r.dropped]
        best = max(r.reward for r in rollouts)
        assert kept.reward == best
        lengths = [len(r.response_ids) for r in rollouts if r.reward == best]
        assert len(kept.response_ids) == max(lengths)
    assert batches[0].totals.demonstrated.sequences == 2


def test_likelihoods_are_asked_of_ties_alone_and_without_views() -> None:
    seen: list[Rollout] = []

    def record(batches: Sequence[RolloutBatch]) -> list[float]:
        seen.extend(r for batch in batches for r in batch.rollouts if not batch.is_filler)
        assert all(batch.views.keys() == {"student"} for batch in batches)
        return by_length(batches)

    batches = Run(mix=HALF, teacher_samples=4, likelihoods=record).steps(1)
    rewards = {g: max(r.reward for r in rows) for g, rows in of_teacher(batches).items()}
    assert seen
    assert all(r.author is Author.TEACHER and r.reward == rewards[r.group] for r in seen)


def chosen(batches: Sequence[RolloutBatch]) -> list[tuple[int, list[int], bool]]:
    rollouts = [r for batch in batches for r in batch.rollouts]
    return [(r.group, r.response_ids, r.dropped) for r in rollouts]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_chooses_the_same(staleness: int) -> None:
    settings: dict[str, Any] = {"mix": HALF, "teacher_samples": 3, "likelihoods": by_length}
    expected = chosen(Run(staleness=staleness, **settings).steps(4))
    assert any(dropped for *_, dropped in expected)
    first = Run(staleness=staleness, **settings)
    first.steps(2)
    second = Run(staleness=staleness, step=2, **settings)
    second.stream.load_state_dict(plain(first.stream.state_dict()))
    resumed = chosen(second.steps(2))
    assert resumed == expected[-len(resumed) :]


def test_other_ranks_ties_are_waited_for() -> None:
    """A rank without ties takes part in the student's passes all the same."""
    asked: list[int] = []

    def count(batches: Sequence[RolloutBatch]) -> list[float]:
        asked.append(len(batches))
        return by_length(batches)

    run = Run(rank=0, world=2, teacher_samples=2, likelihoods=count, gather=lambda n: [n, 3])
    run.steps(1)
    assert asked == [2]  # as many passes as there are micro-batches


def test_the_likelihood_is_the_mean_over_the_tokens(tiny_model_dir: TinyModelDir) -> None:
    student = Student(str(tiny_model_dir()))
    student.load()
    rollouts = [make_rollout([5, 6, 2], prompt_ids=[3, 4]), make_rollout([8, 2])]
    batch = make_batch(rollouts, temperature=1.0)
    with torch.no_grad():
        expected = []
        for rollout in rollouts:
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
            logprobs = student.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            expected.append(chosen[len(rollout.prompt_ids) - 1 :].mean().item())
    assert mean_logprobs(student, [batch]) == pytest.approx(expected, abs=1e-5)


def test_one_response_has_no_best() -> None:
    for settings in ({"keep": "best"}, {"samples": 0}):
        with pytest.raises(UserError, match=r"data\.teacher\."):
            TeacherSampler(path="x", engine=HFEngine(), **settings)
