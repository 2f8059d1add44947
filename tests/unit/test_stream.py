"""Prompt order, seeds, micro-batches, versions and resumption of the training stream."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from torch import Tensor

from opd_lightning.data.engines import Engines
from opd_lightning.data.order import PromptOrder
from opd_lightning.data.stream import check_versions
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import RunStoppedError, StaleRolloutsError, UserError
from opd_lightning.evaluation.stream import EvaluationStream
from opd_lightning.models.source import ModelSource
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Request, Sampling
from opd_lightning.seeding import derive_seed
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Completion, RolloutBatch, WholeStep
from tests.batches import make_rollout
from tests.streams import IDS, PROMPTS, FakeEngine, FakeTokenizer, Run, plain, rows, written


def test_order_takes_every_prompt_once_a_pass() -> None:
    order = PromptOrder(10, seed=1)
    passes = [order.take(10 * n, 10) for n in range(3)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1]
    assert order.take(7, 6) == passes[0][7:] + passes[1][:3]  # going back works too
    assert PromptOrder(10, seed=2).take(0, 10) != passes[0]


def test_seeds_are_functions_of_coordinates() -> None:
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) == 272184802
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert len({derive_seed(0, i, j) for i in range(50) for j in range(50)}) == 2500


def test_a_step_is_generated_once_with_current_weights() -> None:
    run = Run(micro=3)
    first = run.steps(1)
    assert run.engine.log == ["start", "push 0", "generate"]
    run.steps(1)
    assert run.engine.log[3:] == ["push 1", "generate"]
    assert len(rows(first)) == 12
    assert {b.totals.step for b in first} == {0}
    assert {b.totals.all.tokens for b in first} == {sum(n for _, n in rows(first))}


def test_length_and_epochs() -> None:
    run = Run()
    assert len(run.stream) == 2 * 2  # 10 prompts, 4 a step, 2 micro-batches
    assert len(Run(per_step=12).stream) == 2  # fewer prompts than a step takes
    assert [b.totals.step for b in run] == [0, 0, 1, 1]
    assert [b.totals.step for b in run] == [2, 2, 3, 3]


def test_an_epoch_ends_where_lightning_ends_it() -> None:
    run = Run(limit=2)
    assert [b.totals.step for b in run] == [0, 0]
    assert [b.totals.step for b in run] == [1, 1]


def test_two_ranks_write_what_one_would() -> None:
    alone = sorted(rows(Run()))
    together = [row for rank in (0, 1) for row in rows(Run(rank=rank, world=2))]
    assert sorted(together) == alone


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("taken", [2, 3, 4, 7])  # after a step, inside one, at an epoch's end
def test_resume_repeats_and_skips_nothing(taken: int, staleness: int) -> None:
    expected = written(Run(staleness=staleness).steps(6))
    first = Run(staleness=staleness)
    batches = itertools.chain.from_iterable(itertools.repeat(first))
    seen = written([next(batches) for _ in range(taken)])
    state = plain(first.stream.state_dict())
    second = Run(staleness=staleness, step=first.step)
    second.stream.load_state_dict(state)
    whole = taken // 2
    resumed = written(second.steps(6 - whole))
    assert seen[: 2 * whole] + resumed == expected


def positions(batch: RolloutBatch) -> int:
    return batch.views["student"].input_ids.numel()


def test_a_budget_decides_how_many_micro_batches_a_step_has() -> None:
    steps = Run(micro=1, max_tokens=12).whole_steps(6)
    assert max(positions(batch) for step in steps for batch in step) <= 12
    assert len({len(step) for step in steps}) > 1
    expected = Run(micro=1).steps(6)
    assert [sorted(rows(step)) for step in steps] == [sorted(rows([batch])) for batch in expected]
    assert [batch.totals for (batch, *_) in steps] == [batch.totals for batch in expected]
    assert not any(batch.is_filler for step in steps for batch in step)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_budget_cuts_a_resumed_step_alike(taken: int) -> None:
    expected = [written(step) for step in Run(micro=1, max_tokens=12).whole_steps(4)]
    first = Run(micro=1, max_tokens=12)
    first.whole_steps(taken)
    second = Run(micro=1, max_tokens=12, step=taken)
    second.stream.load_state_dict(plain(first.stream.state_dict()))
    assert [written(step) for step in second.whole_steps(4 - taken)] == expected[taken:]


def test_ranks_have_as_many_micro_batches_as_the_one_that_needs_most() -> None:
    """Also if a rank has fewer rollouts: it reads one of them again then, and learns nothing."""

    def run(others: int) -> WholeStep:
        mine: dict[str, Any] = {"rank": 1, "world": 2, "micro": 1, "max_tokens": 24}
        (step,) = Run(**mine, gather=lambda needed: [others, needed]).whole_steps(1)
        return step

    alone = run(0)
    assert len(alone) < 5
    for others in (5, 6):
        assert len(run(others)) == others
        assert not any(batch.is_filler for batch in run(others))
    *six, one, two = run(8)
    assert written(six) == written(run(6))
    for filler in (one, two):
        assert filler.is_filler
        assert not filler.response_mask.any()
        assert rows([filler]) == [rows(six)[-1]]
        assert filler.totals == six[0].totals


def test_groups_carry_their_mean_and_spread() -> None:
    rollouts = [r for batch in Run().steps(1) for r in batch.rollouts]
    for rollout in rollouts:
        group = [r.reward for r in rollouts if r.prompt.id == rollout.prompt.id]
        assert len(group) == 3
        assert rollout.reward == float(len(rollout.response_ids) > 2)
        assert rollout.group_mean == pytest.approx(sum(group) / 3)
        assert rollout.group_std == pytest.approx(statistics.pstdev(group))
    assert len({r.group_mean for r in rollouts}) > 1


def test_a_step_number_that_means_something_else_is_refused() -> None:
    state = Run().stream.state_dict()
    with pytest.raises(UserError, match="accumulate_grad_batches was 2 in the checkpoint and is 3"):
        Run(micro=3).stream.load_state_dict(state)
    with pytest.raises(UserError, match="prompts_per_step was 4"):
        Run(per_step=2).stream.load_state_dict(state)
    with pytest.raises(UserError, match="max_staleness was 0 in the checkpoint and is 1 now"):
        Run(staleness=1).stream.load_state_dict(state)


class StuckEngine(FakeEngine):
    """Takes its first weights and no others."""

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.version < 0:
            super().load_weights(version, weights)


@pytest.mark.parametrize(("staleness", "step"), [(0, 1), (1, 2)])
def test_rollouts_of_older_weights_stop_the_step(staleness: int, step: int) -> None:
    run = Run(StuckEngine(), staleness=staleness)
    run.steps(step)
    with pytest.raises(StaleRolloutsError, match=f"step {step}: got rollouts .* of version 0"):
        run.steps(1)


class UnfitEngine(FakeEngine):
    """Changes what it generates by a function."""

    def __init__(self, change: Callable[[list[Completion]], list[Completion]]) -> None:
        super().__init__()
        self.change = change

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return self.change(super().generate(requests, sampling))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all: all[1:], r"got \d+ completions for \d+ requests, expected one for each"),
        (
            lambda all: [one._replace(logprobs=[-0.5, *one.logprobs]) for one in all],
            r"got \d log-probs for a response of \d tokens, expected one for each",
        ),
        (
            lambda all: [
                one._replace(response_ids=[7] * 2000, logprobs=[-0.5] * 2000) for one in all
            ],
            r"got a response of 2000 tokens, expected at most 1024 \(max_new_tokens\)",
        ),
    ],
)
def test_completions_that_do_not_fit_the_requests(
    change: Callable[[list[Completion]], list[Completion]], said: str
) -> None:
    with pytest.raises(RunStoppedError, match=rf"^UnfitEngine\.generate: {said}"):
        Run(UnfitEngine(change)).steps(1)


def test_demonstrations_have_no_version_to_prove() -> None:
    given = [make_rollout([7], author=author) for author in (Author.TEACHER, Author.RECORDED)]
    check_versions(given, step=5, max_staleness=0)
    for author in (Author.STUDENT, Author.GUIDED):
        with pytest.raises(StaleRolloutsError, match="version 0, expected version 5 or 4"):
            check_versions([*given, make_rollout([7], author=author)], step=5, max_staleness=1)
    newer = replace(make_rollout([7]), policy_version=6)
    with pytest.raises(StaleRolloutsError, match="version 6"):
        check_versions([newer], step=5, max_staleness=1)


def test_an_engine_sleeps_while_the_trainer_works() -> None:
    run = Run(FakeEngine(sleep_while_training=True))
    batches = iter(run)
    next(batches)
    assert run.engine.log == ["start", "push 0", "generate", "sleep"]
    next(batches)
    run.engines.prepare([Author.STUDENT])  # a validation
    assert run.engine.log[4:] == ["wake", "push 1"]
    next(batches)
    assert run.engine.log[6:] == ["generate", "sleep"]
    next(batches)
    run.steps(1)
    assert run.engine.log[8:] == ["wake", "push 2", "generate", "sleep"]
    run.engines.close()
    assert run.engine.log[12:] == ["close"]


def test_what_slept_is_pushed_to_again() -> None:
    """Within one step too: the weights it wakes with are rubbish."""
    run = Run(FakeEngine(sleep_while_training=True))
    for _ in range(2):
        run.engines.prepare([Author.STUDENT])
        run.engines.sleep()
    assert run.engine.log == ["start", "push 0", "sleep", "wake", "push 0", "sleep"]


def test_evaluation_is_split_over_ranks_and_paired_between_steps() -> None:
    def suite(rank: int, world: int) -> EvaluationStream:
        engines = Engines(FakeEngine(), None, lambda engine: None)
        engines.plan(Author.STUDENT, cast(ModelSource, None), 64)
        return EvaluationStream(
            "s",
            PROMPTS,
            IDS,
            writer=RolloutWriter(
                engines.by_author,
                None,
                Renderer(FakeTokenizer(), {}, {}, ()),
                StepTimer(),
            ),
            engines=engines,
            sampling=Sampling(),
            samples=2,
            batch_size=4,
            seed=0,
            ranks=Ranks(rank=rank, world_size=world, sum=lambda n: n, gather=lambda x: [x]),
        )

    def answers(*streams: EvaluationStream) -> list[tuple[str, int]]:
        return sorted(
            (r.prompt.id, len(r.response_ids)) for s in streams for b in s for r in b.rollouts
        )

    assert len(suite(0, 1)) == 3
    assert [len(b.rollouts) for b in suite(0, 1)] == [8, 8, 4]
    assert answers(suite(0, 1)) == answers(suite(0, 3), suite(1, 3), suite(2, 3))
    assert answers(suite(0, 1)) == answers(suite(0, 1))
    many = [suite(rank, 12) for rank in range(12)]  # more than there are prompts
    assert {len(one) for one in many} == {1}
    assert answers(*many) == answers(suite(0, 1))


def test_batches_are_shared_out() -> None:
    for count, size, world in ((7, 2, 3), (1, 4, 2), (0, 3, 2), (8, 2, 2), (5, 1, 1)):
        ranks = [
            Ranks(rank=rank, world_size=world, sum=int, gather=lambda x: [x])
            for rank in range(world)
        ]
        shares = [rank.batches(count, size) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        assert all(len(batch) <= size for share in shares for batch in share)
        assert sorted(i for share in shares for batch in share for i in batch) == [*range(count)]
