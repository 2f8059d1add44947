"""What a user's part returns wrongly is named in one line, and never trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import RunStoppedError
from opd_lightning.losses.divergence import checked_values
from opd_lightning.rules.base import Rule, Scored, Signal
from opd_lightning.training.outputs import checked_scores, checked_signal, checked_tokens
from opd_lightning.types import RolloutBatch
from opd_lightning.verifiers import Rewards, Verifier
from opd_lightning.verifiers.base import checked_rewards, checked_score
from tests.toy import make_scored, opd_signal

SQUARE = torch.full((3, 3), -1.0)  # where a tensor [3] broadcasts over [3, 3]
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda x: 1.0,
    "None": lambda x: None,
    "mean": lambda x: x.mean(),
    "rows": lambda x: x.sum(1),
    "bool": lambda x: x > 0,
    "short": lambda x: x[:, :-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_tokens_have_the_shape_of_the_tokens(name: str) -> None:
    with pytest.raises(RunStoppedError, match=r"^Any\.advantage: got .*, expected numbers of the"):
        checked_tokens(type("Any", (), {})(), "advantage", WRONG[name](SQUARE), SQUARE)


def test_values_of_rows_are_those_of_their_tokens() -> None:
    values = torch.arange(3.0)[:, None]
    assert torch.equal(checked_tokens(None, "advantage", values, SQUARE), values.expand(3, 3))


class AnyRule(Rule):
    def __init__(self, change: Callable[[Signal], Any]) -> None:
        self.change = change

    def apply(self, signal: Signal, scored: Scored, observed: Tensor | None = None) -> Any:
        return self.change(signal)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s, "got Signal, expected a Signal and a table of rates"),
        (lambda s: (s.advantage, {}), "expected a Signal and a table"),
        (lambda s: (s, None), "and nothing (None), expected a Signal and a table"),
        (lambda s: (replace(s, weight=s.weight.mean(1)), {}), "apply, weight: got a tensor"),
        (lambda s: (replace(s, advantage=0.0), {}), "apply, advantage: got float"),
        (lambda s: (replace(s, mask=s.mask.float()), {}), "apply, mask: got a tensor of float32"),
        (lambda s: (replace(s, mask=s.mask | True), {}), "got tokens that are padding"),
        (lambda s: (s, {"kept": 0.5}), "rate 'kept': got float"),
        (lambda s: (s, {"kept": s.weight.mean(1)}), "rate 'kept': got a tensor"),
    ],
)
def test_a_rule_returns_a_signal_and_rates(change: Callable[[Signal], Any], said: str) -> None:
    mask = torch.tensor([[True, True, False]]).expand(3, 3)
    scored = make_scored(SQUARE, SQUARE - 1, mask=mask)
    before, rule = opd_signal(scored), AnyRule(change)
    with pytest.raises(RunStoppedError) as caught:
        checked_signal(rule, rule.apply(before, scored), before)
    assert str(caught.value).startswith("AnyRule.apply")
    assert said in str(caught.value)


def test_a_rule_may_leave_tokens_out() -> None:
    scored = make_scored(SQUARE, SQUARE - 1)
    before = opd_signal(scored)
    fewer = replace(before, mask=before.mask & (torch.arange(3) < 2))
    found, _ = checked_signal(AnyRule(replace), (fewer, {"kept": fewer.mask}), before)
    assert torch.equal(found.mask, fewer.mask)


def test_a_teacher_returns_scores_of_all_tokens() -> None:
    batch = cast(RolloutBatch, SimpleNamespace(response_mask=SQUARE < 0))
    scores = make_scored(SQUARE, SQUARE).teacher
    assert checked_scores(None, "score", scores, batch) is scores
    for wrong in (scores.logprobs, replace(scores, logprobs=SQUARE[0]), None):
        with pytest.raises(RunStoppedError, match=r"^Any\.score.*: got .*expected"):
            checked_scores(type("Any", (), {})(), "score", wrong, batch)


def test_a_divergence_has_a_value_for_each_token() -> None:
    assert torch.equal(checked_values(len, SQUARE[0], 3), SQUARE[0])
    for wrong in (SQUARE.sum(), SQUARE[:2], 1.0):
        with pytest.raises(RunStoppedError, match=r"^len: got .* for 3 tokens, expected \[3\]"):
            checked_values(len, wrong, 3)


class AnyVerifier(Verifier):
    def verify(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        raise NotImplementedError


@pytest.mark.parametrize("wrong", [1.0, None, "11", [torch.ones(2), 1.0], [1.0, "yes"], [{}, 1]])
def test_a_verifier_returns_numbers(wrong: Any) -> None:
    prompts: Any = [SimpleNamespace(origin="a:1", id="a")] * 2
    with pytest.raises(RunStoppedError, match=r"AnyVerifier.*, expected a "):
        checked_rewards(AnyVerifier(), prompts, wrong)


def test_numbers_of_other_libraries_are_numbers() -> None:
    prompts: Any = [SimpleNamespace(origin="a:1", id="a")] * 2
    assert checked_rewards(AnyVerifier(), prompts, torch.ones(2)) == [1, 1]
    assert checked_rewards(AnyVerifier(), prompts, [True, 0]) == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [[1.0, 1.0], None, Rewards([1.0, 1.0], {"a": [1.0]}), Rewards([1.0, 1.0], {"a": ["x", "y"]})],  # type: ignore[list-item]
)
def test_and_rewards_with_a_number_for_each_part(wrong: Any) -> None:
    with pytest.raises(RunStoppedError, match=r"^AnyVerifier\.score: got .*, expected"):
        checked_score(AnyVerifier(), wrong, 2)
