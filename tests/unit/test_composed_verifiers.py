"""Verifiers made of others: by domain, weighted sums; and their parts in the log."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.metrics.step import RewardParts
from opd_lightning.types import Author, Message, Prompt
from opd_lightning.verifiers import (
    ByDomainVerifier,
    ExactMatch,
    LengthLimit,
    Part,
    RegexMatch,
    Verifier,
    WeightedVerifier,
)
from tests.batches import make_batch, make_rollout


def prompt(answer: str | None, domain: str) -> Prompt:
    message: Message = {"role": "user", "content": "?"}
    return Prompt(
        id=f"{domain}-{answer}", messages=(message,), answer=answer, domain=domain, origin="p:1"
    )


class Fixed(Verifier):
    """Gives what it is told, and says it."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return list(self.scores[: len(responses)])

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str | None]:
        return [f"{type(self).__name__} {text}" if text else None for text in responses]

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass


PROMPTS = [prompt("1", "sums"), prompt("x", "words"), prompt("2", "sums"), prompt(None, "other")]
TEXTS = ["1", "it is x.", "3", "y"]


def test_each_domain_has_its_verifier() -> None:
    by_domain = ByDomainVerifier(
        {"sums": ExactMatch(), "words": RegexMatch("x")}, default=Fixed(0.25)
    )
    rewards = by_domain.score(PROMPTS, TEXTS)
    assert rewards.totals == by_domain.verify(PROMPTS, TEXTS) == [1, 1, 0, 0.25]
    assert rewards.parts["sums"][:3:2] == [1, 0]
    assert rewards.parts["words"][1] == 1
    known = {name: [not math.isnan(s) for s in scores] for name, scores in rewards.parts.items()}
    assert known == {"sums": [True, False, True, False], "words": [False, True, False, False]}
    # The same as the domains alone.
    assert ExactMatch().verify([PROMPTS[0], PROMPTS[2]], ["1", "3"]) == [1, 0]
    assert by_domain.feedback(PROMPTS, TEXTS) == [None, None, None, "Fixed y"]
    by_domain.check(PROMPTS)


def test_a_domain_without_a_verifier_is_refused_before_training() -> None:
    by_domain = ByDomainVerifier({"sums": ExactMatch(), "words": RegexMatch("x")})
    with pytest.raises(UserError, match=r"no verifier for domain 'other'.* sums, words"):
        by_domain.check(PROMPTS)
    with pytest.raises(UserError, match="'answer'"):
        by_domain.check([prompt(None, "sums")])
    with pytest.raises(UserError, match="one per domain"):
        ByDomainVerifier({})


def test_a_weighted_sum_maps_adds_and_keeps_its_parts() -> None:
    verifier = WeightedVerifier(
        {
            "correct": Part(verifier=ExactMatch(), weight=0.75),
            "signed": Part(verifier=Fixed(-1, 0, 1), weight=0.25, scale=(-1, 1)),
            "seen": Part(verifier=Fixed(0, 1, math.nan), weight=0, scale=(1, 0)),
        }
    )
    prompts = [PROMPTS[0]] * 3
    rewards = verifier.score(prompts, ["1", "2", "1"])
    assert rewards.totals == [0.75, 0.125, 1.0]
    assert rewards.parts["signed"] == [0, 0.5, 1]
    assert rewards.parts["seen"][:2] == [1, 0]
    assert verifier.answers(["1", "2"]) == ["1", "2"]
    assert verifier.feedback(prompts, ["a", "", "b"]) == [
        "Fixed a\nFixed a",
        None,
        "Fixed b\nFixed b",
    ]


def test_full_scores_add_up_to_1_where_the_weights_are_rounded() -> None:
    """`only_correct` keeps rewards of 1 alone."""
    for weight in (0.3333333, 0.33333336):
        parts = {name: Part(verifier=Fixed(1, 0), weight=weight) for name in "abc"}
        assert WeightedVerifier(parts).verify([PROMPTS[0]] * 2, ["1", "2"]) == [1, 0]


def test_a_response_that_a_part_could_not_check_has_no_reward() -> None:
    parts = {
        "a": Part(verifier=Fixed(1, math.nan), weight=0.5),
        "b": Part(verifier=Fixed(1, 1), weight=0.5),
    }
    first, second = WeightedVerifier(parts).verify([PROMPTS[0]] * 2, ["1", "2"])
    assert first == 1
    assert math.isnan(second)


def test_weights_and_scales_are_checked() -> None:
    half = Part(verifier=Fixed(1), weight=0.5)
    with pytest.raises(UserError, match=r"sum to 0\.5"):
        WeightedVerifier({"a": half})
    for wrong in ({"weight": -1.0}, {"weight": math.nan}, {"scale": (1.0, 1.0)}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Part(verifier=Fixed(1), **wrong)
    with pytest.raises(RunStoppedError, match=r"p:1: Fixed gave .* score 4, expected 0 to 1"):
        WeightedVerifier({"a": Part(verifier=Fixed(4))}).verify([PROMPTS[0]], ["1"])
    nothing: Any = None
    part = Part(verifier=Fixed(nothing), scale=(-1, 1))
    with pytest.raises(RunStoppedError, match=r"p:1: Fixed gave .* None, expected a number, or"):
        WeightedVerifier({"a": part}).verify([PROMPTS[0]], ["1"])
    with pytest.raises(RunStoppedError, match="got 1 rewards for 2 responses"):
        WeightedVerifier({"a": Part(verifier=Fixed(1))}).verify([PROMPTS[0]] * 2, ["1", "2"])


def test_length_scores_fall_linearly() -> None:
    limit = LengthLimit(full=4, zero=8)
    assert limit.verify([PROMPTS[0]] * 4, ["", "a" * 4, "a" * 5, "a" * 9]) == [1, 1, 0.75, 0]
    with pytest.raises(UserError, match="full 4 and zero 4"):
        LengthLimit(full=4, zero=4)


def test_parts_are_logged_over_the_student_s_responses_that_have_them() -> None:
    metric = RewardParts()
    nan = math.nan
    metric.update(make_batch([make_rollout([5], reward_parts={"a": 1.0, "b": nan})]))
    other = make_rollout([5], reward_parts={"a": 0.0, "b": 0.5})
    teacher = make_rollout([5], author=Author.TEACHER, reward_parts={"a": 1.0, "b": 1.0})
    metric.update(make_batch([other, teacher]))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {"reward/a": 0.5, "reward/b": 0.5}
    metric = RewardParts()
    metric.update(make_batch([make_rollout([5])]))
    assert metric.compute() == {}


def test_of_very_many_parts_the_first_are_logged() -> None:
    """Such as the domains of a collection of tasks."""
    metric = RewardParts()
    parts = {f"task_{i}": i / 1000 for i in range(RewardParts.MAX_NAMES + 5)}
    metric.update(make_batch([make_rollout([5], reward_parts=parts)]))
    values = {name: value.item() for name, value in metric.compute().items()}
    first = list(parts)[: RewardParts.MAX_NAMES]
    assert values == pytest.approx({f"reward/{name}": parts[name] for name in first})
