"""Prompt order, seeds, micro-batches and the cursor of the training stream."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from torch import Tensor

from opd_lightning.data.micro_batches import split_balanced
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.order import PromptOrder
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.stream import EvaluationStream, TrainingStream
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.seeding import derive_seed
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Completion, Prompt, RolloutBatch, StopReason
from opd_lightning.verifiers.base import Verifier
from tests.batches import make_rollout

PROMPTS = [Prompt(id=str(i), messages=({"role": "user", "content": str(i)},)) for i in range(10)]
IDS = [[100 + i] for i in range(10)]


class FakeEngine(Engine):
    """Writes `seed % 5 + 1` tokens and records who asked for what."""

    version = 0

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.log: list[str] = []

    def start(self, source: Any, *, max_length: int) -> None: ...
    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.log.append("generate")
        self.requests += requests
        return [
            Completion([7] * (r.seed % 5 + 1), [-0.5] * (r.seed % 5 + 1), StopReason.EOS)
            for r in requests
        ]

    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class FakeTokenizer:
    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str(len(row)) for row in rows]


class LengthVerifier(Verifier):
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(int(text) > 2) for text in responses]

    def check(self, prompts: Sequence[Prompt]) -> None: ...


def stream(
    engine: FakeEngine,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 2,
    per_step: int = 4,
    mix: RolloutMix = RolloutMix(),  # noqa: B008 - frozen
) -> TrainingStream:
    timer = StepTimer()
    return TrainingStream(
        PROMPTS,
        IDS,
        writer=RolloutWriter(
            dict.fromkeys(Author, engine),
            lambda author: engine.log.append("start" if author is Author.TEACHER else "push"),
            LengthVerifier(),
            Renderer(FakeTokenizer(), {}, {}, ()),
            timer,
        ),
        samplings={author: Sampling() for author in Author},
        mix_at=lambda step: mix,
        prepare=lambda batches: None,
        prompts_per_step=per_step,
        samples_per_prompt=3,
        micro_batches=micro,
        seed=5,
        ranks=Ranks(rank=rank, world_size=world, sum=lambda n: n * world),
        pad_id=0,
        timer=timer,
    )


def rows(batches: Iterable[RolloutBatch]) -> list[tuple[str, int]]:
    return [(r.prompt.id, len(r.response_ids)) for b in batches for r in b.rollouts]


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
    engine = FakeEngine()
    batches = iter(stream(engine, micro=3))
    first = [next(batches) for _ in range(3)]
    assert engine.log == ["push", "generate"]
    next(batches)
    assert engine.log == ["push", "generate"] * 2
    assert len(rows(first)) == 12
    assert {b.totals.step for b in first} == {0}
    assert {b.totals.all.tokens for b in first} == {sum(n for _, n in rows(first))}


def test_length_and_epochs() -> None:
    source = stream(FakeEngine())
    assert len(source) == 2 * 2  # 10 prompts, 4 a step, 2 micro-batches
    assert [b.totals.step for b in source] == [0, 0, 1, 1]
    assert [b.totals.step for b in source] == [2, 2, 3, 3]


def test_two_ranks_write_what_one_would() -> None:
    alone = sorted(rows(stream(FakeEngine())))
    together = [row for rank in (0, 1) for row in rows(stream(FakeEngine(), rank=rank, world=2))]
    assert sorted(together) == alone


def test_all_ranks_push_weights_where_the_student_writes_for_any() -> None:
    logs = []
    for rank in range(4):
        engine = FakeEngine()
        source = stream(engine, rank=rank, world=4, micro=1, mix=RolloutMix(teacher=0.75))
        next(iter(source))
        logs.append(engine.log)
    assert all(log.count("push") == 1 for log in logs)
    assert sum("start" in log for log in logs) == 3


@pytest.mark.parametrize("taken", [2, 4])
def test_resume_repeats_and_skips_nothing(taken: int) -> None:
    whole = stream(FakeEngine())
    expected = [b for _ in range(3) for b in whole]
    first = stream(FakeEngine())
    seen: list[RolloutBatch] = []
    batches = iter(first)
    while len(seen) < taken:
        seen.append(next(batches))
    second = stream(FakeEngine())
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen += list(second)
    assert rows(seen) == rows(expected)


def test_groups_carry_their_mean_and_spread() -> None:
    rollouts = [r for batch in list(stream(FakeEngine()))[:2] for r in batch.rollouts]
    for rollout in rollouts:
        group = [r.reward for r in rollouts if r.prompt.id == rollout.prompt.id]
        assert len(group) == 3
        assert rollout.reward == float(len(rollout.response_ids) > 2)
        assert rollout.group_mean == pytest.approx(sum(group) / 3)
        assert rollout.group_std == pytest.approx(statistics.pstdev(group))
    assert len({r.group_mean for r in rollouts}) > 1


def test_a_cursor_that_means_something_else_is_refused() -> None:
    state = stream(FakeEngine()).state_dict()
    with pytest.raises(UserError, match="accumulate_grad_batches was 2 in the checkpoint and is 3"):
        stream(FakeEngine(), micro=3).load_state_dict(state)
    with pytest.raises(UserError, match="prompts_per_step was 4"):
        stream(FakeEngine(), per_step=2).load_state_dict(state)
    source = stream(FakeEngine())
    next(iter(source))
    with pytest.raises(UserError, match="after 1 of 2 micro-batches"):
        stream(FakeEngine()).load_state_dict(source.state_dict())


def test_micro_batches_are_balanced_and_complete() -> None:
    lengths = [(i * 37) % 101 + 1 for i in range(50)]
    rollouts = [make_rollout([7] * n) for n in lengths]
    for parts in (1, 2, 7, 50):
        split = split_balanced(rollouts, parts)
        assert len(split) == parts
        assert sorted(len(r.response_ids) for p in split for r in p) == sorted(lengths)
        sizes = [len(p) for p in split]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
    loads = [sum(len(r.response_ids) for r in part) for part in split_balanced(rollouts, 5)]
    assert max(loads) / min(loads) < 1.1
    with pytest.raises(ValueError, match="cannot fill"):
        split_balanced(rollouts[:2], 3)


def test_evaluation_is_split_over_ranks_and_paired_between_steps() -> None:
    def suite(rank: int, world: int) -> EvaluationStream:
        return EvaluationStream(
            "s",
            PROMPTS,
            IDS,
            writer=RolloutWriter(
                {Author.STUDENT: FakeEngine()},
                lambda author: None,
                None,
                Renderer(FakeTokenizer(), {}, {}, ()),
                StepTimer(),
            ),
            sampling=Sampling(),
            samples=2,
            batch_size=4,
            seed=0,
            ranks=Ranks(rank=rank, world_size=world, sum=lambda n: n),
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
