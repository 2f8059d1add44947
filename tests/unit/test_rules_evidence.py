"""Evidence: the parts of the mask (U9), and the methods that the weights reduce to (U15)."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Linear
from opd_lightning.rules.base import Scored, Signal
from opd_lightning.rules.evidence import EvidenceMask, EvidenceMultiplier, EvidenceWeight
from tests.toy import (
    applied,
    expected_rule_gradient,
    make_scored,
    opd_signal,
    random_logits,
    token_logprobs,
)

STUDENT, TEACHER, PLAIN = (random_logits(seed) for seed in range(3))
E = [0.05, 0.2, -0.2, 0.0]  # evidence of the hand-made fixture
D = [1.0, -1.0, -1.0, 1.0]


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def fixture(step: int = 0) -> Scored:
    teacher = row([-2.0] * 4)
    return make_scored(teacher - row(D), teacher, plain=teacher - row(E), step=step)


def gradient(rule: Any, plain: Tensor = PLAIN) -> Tensor:
    return expected_rule_gradient(rule, STUDENT, TEACHER, plain=token_logprobs(plain))


def test_u9_masks_partition_the_gradient_of_opsd() -> None:
    positive = gradient(EvidenceMask("positive"))
    negative = gradient(EvidenceMask("negative"))
    torch.testing.assert_close(positive + negative, gradient(None), atol=1e-12, rtol=0)
    assert min(positive.abs().max(), negative.abs().max()) > 0.01


def test_u9_a_mask_of_ones_is_opsd_and_of_zeros_nothing() -> None:
    assert torch.equal(gradient(EvidenceMask(threshold=-torch.inf)), gradient(None))
    assert gradient(EvidenceMask(threshold=torch.inf)).abs().max() == 0


@pytest.mark.parametrize("region", ["positive", "negative"])
def test_u9_no_privileged_text_leaves_nothing(region: Literal["positive", "negative"]) -> None:
    """Both scores are one, e is 0 exactly, and both inequalities are strict."""
    assert gradient(EvidenceMask(region), plain=TEACHER).abs().max() == 0


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("positive", [True, True, False, False]),
        ("negative", [False, False, True, False]),
        ("near-zero", [True, False, False, True]),
    ],
)
def test_regions_by_hand(region: Any, expected: list[bool]) -> None:
    signal, rates = applied(EvidenceMask(region), fixture())
    assert signal.mask.tolist() == [expected]
    assert torch.equal(signal.advantage, row(D))  # left out, not pushed down
    assert rates["evidence/kept"].tolist() == [[float(k) for k in expected]]


def test_threshold_and_width_move_the_borders() -> None:
    kept = [
        applied(rule, fixture())[0].mask.tolist()
        for rule in (EvidenceMask(threshold=0.1), EvidenceMask("near-zero", width=0.01))
    ]
    assert kept == [[[False, True, False, False]], [[False, False, False, True]]]
    teacher = row([-2.0] * 4)
    scored = make_scored(teacher, teacher, plain=teacher - row([0.25, -0.25, 0.5, 0.0]))
    on_the_border = applied(EvidenceMask("near-zero", width=0.25), scored)[0]
    assert on_the_border.mask.tolist() == [[True, True, False, True]]
    above = applied(EvidenceMask(threshold=0.25), scored)[0]
    assert above.mask.tolist() == [[False, False, True, False]]


def test_diagnostics_by_hand() -> None:
    _, rates = applied(EvidenceMask("positive"), fixture())
    _, soft = applied(EvidenceWeight(epsilon=0.1), fixture())
    for values in (rates, soft):
        torch.testing.assert_close(values["evidence/mean"], row(E))
        torch.testing.assert_close(values["evidence/abs_mean"], row(E).abs())
        # sign e = sign d; e = 0 agrees with d = 0 only.
        assert values["evidence/agreement"].tolist() == [[1, 0, 1, 0]]
    # exp(0.05) - 1 = 0.0513 is just enough; a mask moves only what it keeps.
    assert rates["evidence/leverage"].tolist() == [[1, 1, 0, 0]]
    assert soft["evidence/leverage"].tolist() == [[1, 1, 1, 0]]
    torch.testing.assert_close(soft["evidence/shift"], row([torch.e**0.05 - 1, 0.1, 0.1, 0.0]))


def test_u15_weight_by_hand_and_without_width() -> None:
    signal, _ = applied(EvidenceWeight(epsilon=0.1), fixture())
    torch.testing.assert_close(signal.weight, row([torch.e**0.05, 1.1, 0.9, 1.0]))
    assert torch.equal(gradient(EvidenceWeight(epsilon=0.0)), gradient(None))
    assert not torch.allclose(gradient(EvidenceWeight(epsilon=0.2)), gradient(None))


def with_outcome(scored: Scored, outcome: float) -> Signal:
    signal = opd_signal(scored)
    return Signal(
        advantage=torch.full_like(signal.advantage, outcome),
        weight=signal.weight,
        mask=signal.mask,
    )


def multiplied(rule: EvidenceMultiplier, outcome: float, step: int = 0) -> Tensor:
    scored = fixture(step)
    return applied(rule, scored, with_outcome(scored, outcome))[0].advantage


def test_u15_rlsd_by_hand() -> None:
    up = multiplied(EvidenceMultiplier(epsilon=0.1), 2.0)
    torch.testing.assert_close(up, 2 * row([torch.e**0.05, 1.1, 0.9, 1.0]))
    # What the text speaks for is blamed less for a failure.
    down = multiplied(EvidenceMultiplier(epsilon=0.1), -2.0)
    torch.testing.assert_close(down, -2 * row([torch.e**-0.05, 0.9, 1.1, 1.0]))


@pytest.mark.parametrize(
    "rule", [EvidenceMultiplier(epsilon=0.0), EvidenceMultiplier(mix=0.0)], ids=repr
)
@pytest.mark.parametrize("outcome", [-2.0, 0.0, 2.0])
def test_u15_rlsd_without_width_or_mix_is_grpo(rule: EvidenceMultiplier, outcome: float) -> None:
    assert multiplied(rule, outcome).tolist() == [[outcome] * 4]


def test_mix_may_follow_a_schedule() -> None:
    rule = EvidenceMultiplier(epsilon=0.1, mix=Linear(start=1.0, end=0.0, steps=2))
    shifts = [multiplied(rule, 1.0, step)[0, 1].item() - 1 for step in (0, 1, 2)]
    assert shifts == pytest.approx([0.1, 0.05, 0.0])


def test_evidence_against_the_student_is_the_log_ratio() -> None:
    rule = EvidenceMultiplier(epsilon=0.5, evidence="student")
    torch.testing.assert_close(multiplied(rule, 1.0), row([1.5, 0.5, 0.5, 1.5]))
    assert "plain" not in rule.needs
    for reader in (EvidenceMultiplier(), EvidenceMask(), EvidenceWeight()):
        assert reader.needs == ("teacher", "plain")


@pytest.mark.parametrize("rule", [EvidenceWeight(), EvidenceMultiplier()], ids=repr)
def test_enormous_evidence_is_clipped_and_not_infinite(rule: Any) -> None:
    teacher = row([-1.0, -1.0])
    scored = make_scored(teacher - 1.0, teacher, plain=teacher - row([1e4, -1e4]))
    signal, _ = applied(rule, scored)
    torch.testing.assert_close(signal.advantage * signal.weight, row([1.2, 0.8]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvidenceMask(threshold=torch.nan), "EvidenceMask: threshold is nan, expected"),
        (lambda: EvidenceMask(width=-0.1), "EvidenceMask: width is -0.1, expected 0 or more"),
        (
            lambda: EvidenceMask("near-zero", threshold=0.5),
            "threshold is 0.5, expected its default: region 'near-zero' does not read it",
        ),
        (
            lambda: EvidenceMask("negative", width=0.2),
            "width is 0.2, expected its default: region 'negative' does not read it",
        ),
        (lambda: EvidenceWeight(epsilon=1.1), "EvidenceWeight: epsilon is 1.1, expected"),
        (lambda: EvidenceMultiplier(mix=2.0), "EvidenceMultiplier: mix is 2.0, expected"),
    ],
)
def test_mistakes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
