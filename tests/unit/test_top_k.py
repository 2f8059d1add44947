"""Top-k divergences: their identities, their gradients and what is refused, float64."""

import math
from itertools import product
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import (
    JSD,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    kl,
)
from opd_lightning.losses.top_k import TopK
from tests.toy import finite_difference

VOCABULARY, ROWS, K = 8, 5, 3
SUPPORTS = ("student", "teacher", "intersection", "union")
# Normalisation, divergence, gradient, beta: all that may be asked for.
VARIANTS: list[tuple[str, str, str, float | None]] = [
    *product(("none", "renormalise", "tail"), ("reverse",), ("plain", "stop-gradient"), (None,)),
    ("none", "reverse", "corrected", None),
    ("none", "reverse", "per-candidate", None),
    *product(("none", "renormalise", "teacher", "tail"), ("forward",), ("plain",), (None,)),
    *product(("none", "renormalise", "tail"), ("jsd",), ("plain",), (0.0, 0.3, 1.0)),
    *product(("none", "renormalise", "tail"), ("mixed",), ("plain",), (0.3,)),
]
FULL = {"reverse": ReverseKL(), "forward": ForwardKL()}
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_support = pytest.mark.parametrize("support", SUPPORTS)


def make(variant: tuple[Any, ...], **fields: Any) -> TopK:
    names = ("normalise", "divergence", "gradient", "beta")
    return TopK(**dict(zip(names, variant, strict=True)), **fields)


def plain(k: int, support: Any, **fields: Any) -> TopK:
    return TopK(k, support, "none", **fields)


def random_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = random_logits(10), random_logits(11)
S, T = STUDENT.softmax(-1), TEACHER.softmax(-1)


def value_and_gradient(
    divergence: Divergence, student: Tensor = STUDENT, teacher: Tensor = TEACHER
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = divergence(student.log_softmax(-1), teacher.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def weighted_score(weights: Tensor) -> Tensor:
    """`sum_v w_v grad log S(v)` in the logits."""
    return weights - weights.sum(-1, keepdim=True) * S


def support_mask(support: str, k: int = K) -> Tensor:
    """Return a mask of the support by sorting: `[n, V]`."""
    ours, theirs = (
        logits >= logits.sort(descending=True).values[:, k - 1 : k] for logits in (STUDENT, TEACHER)
    )
    choices = {"student": ours, "teacher": theirs, "union": ours | theirs}
    return choices.get(support, ours & theirs)


@every_support
@every_variant
def test_a_token_neither_model_can_say(variant: tuple[Any, ...], support: str) -> None:
    """Vocabulary entries with logit -inf on both sides are as good as absent, also in the top k."""
    filler = torch.full((ROWS, 1), -torch.inf, dtype=torch.float64)
    divergence = make(variant, k=VOCABULARY + 1, support=support)
    padded = (torch.cat([logits, filler], dim=-1) for logits in (STUDENT, TEACHER))
    value, gradient = value_and_gradient(divergence, *padded)
    expected, slope = value_and_gradient(divergence)
    close(value, expected)
    close(gradient, torch.cat([slope, torch.zeros_like(filler)], dim=-1))


def test_the_toy_has_supports_of_several_sizes() -> None:
    assert set(support_mask("intersection").sum(-1).tolist()) == {0, 1, 2}


@every_support
@every_variant
def test_u12_all_of_the_vocabulary_is_the_full_divergence(
    support: str, variant: tuple[Any, ...]
) -> None:
    full = FULL.get(variant[1]) or {"jsd": JSD, "mixed": MixedKL}[variant[1]](variant[3])
    value, gradient = value_and_gradient(make(variant, k=VOCABULARY, support=support))
    expected, slope = value_and_gradient(full)
    close(value, expected)
    close(gradient, slope)


@every_support
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v[2] in ("plain", "corrected")], ids=str
)
def test_gradients_are_finite_differences(support: str, variant: tuple[Any, ...]) -> None:
    divergence = make(variant, k=K, support=support)
    _, gradient = value_and_gradient(divergence)
    numeric = finite_difference(
        lambda logits: divergence(logits.log_softmax(-1), TEACHER.log_softmax(-1)), STUDENT
    )
    close(gradient, numeric, atol=1e-6)
    assert gradient.abs().max() > 0.01


@every_support
def test_supports_by_their_definition(support: str) -> None:
    kept = support_mask(support)
    value, _ = value_and_gradient(plain(K, support))
    close(value, (S * (S / T).log() * kept).sum(-1))
    value, _ = value_and_gradient(plain(K, support, divergence="forward"))
    close(value, (T * (T / S).log() * kept).sum(-1))


@every_support
def test_u12_gradients_of_the_truncated_kl(support: str) -> None:
    kept = support_mask(support)
    of = {
        kind: value_and_gradient(plain(K, support, gradient=kind))
        for kind in ("plain", "stop-gradient", "corrected")
    }
    close(of["stop-gradient"][1], weighted_score(kept * S * (S / T).log()))  # T1
    close(of["corrected"][1], of["stop-gradient"][1])
    difference = of["plain"][1] - of["stop-gradient"][1]
    close(difference, weighted_score(kept * S))  # T2
    assert difference.abs().max() > 0.01
    close(of["stop-gradient"][0], of["plain"][0])
    assert (of["corrected"][0] >= 0).all()
    if support == "teacher":
        assert (of["plain"][0] < 0).any()


@every_support
def test_candidates_have_policy_gradients(support: str) -> None:
    """-sum_K A(v) grad log S(v) with A = -w log(S / T), w = S / sum_K S (2604.13016)."""
    kept = support_mask(support)
    mass = (kept * S).sum(-1, keepdim=True).clamp(min=1e-300)
    value, gradient = value_and_gradient(plain(K, support, gradient="per-candidate"))
    cost = kept * S / mass * (S / T).log()
    close(value, cost.sum(-1))
    close(gradient, weighted_score(cost))
    _, stopped = value_and_gradient(plain(K, support, gradient="stop-gradient"))
    close(gradient * mass, stopped)


@every_support
@every_variant
def test_u3_equal_models(support: str, variant: tuple[Any, ...]) -> None:
    divergence = make(variant, k=K, support=support)
    value, gradient = value_and_gradient(divergence, STUDENT, STUDENT)
    if variant[0] == "teacher":  # the student does not sum to 1 on K: the scale is the loss
        assert (value > 0.01).all()
        return
    close(value, torch.zeros(ROWS, dtype=torch.float64))
    # T3: without normalisation a plain KL has a slope where nothing is to be learnt.
    is_kl = variant[1] != "jsd" or variant[3] in (0.0, 1.0)
    unnormalised_kl = variant[0] == "none" and is_kl
    if unnormalised_kl and variant[2] == "plain":
        assert gradient.abs().max() > 0.01
    else:
        close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("theirs", [0.6, 0.97, 0.985])
def test_u12_plain_truncation_raises_a_token_only_above_e_times(theirs: float) -> None:
    """V = 2, K = 1, S = 0.36: the teacher likes the token more each time, but e S = 0.9786."""
    student = torch.tensor([[0.36, 0.64]], dtype=torch.float64).log()
    teacher = torch.tensor([[theirs, 1 - theirs]], dtype=torch.float64).log()
    _, gradient = value_and_gradient(plain(1, "teacher"), student, teacher)
    assert (gradient[0, 0] < 0) == (theirs > 0.36 * math.e)
    _, gradient = value_and_gradient(plain(1, "teacher", gradient="corrected"), student, teacher)
    assert gradient[0, 0] < 0


def test_revisit_opd_ignores_a_shift_of_all_supported_logits() -> None:
    kept = support_mask("teacher")
    renormalised = TopK(K, "teacher", "renormalise")
    before, gradient = value_and_gradient(renormalised)
    after, _ = value_and_gradient(renormalised, STUDENT + 1.7 * kept)
    close(after, before)
    close(gradient.sum(-1), torch.zeros(ROWS, dtype=torch.float64))
    bare = plain(K, "teacher")
    shifted, _ = value_and_gradient(bare, STUDENT + 1.7 * kept)
    assert ((shifted - value_and_gradient(bare)[0]).abs() > 0.01).all()


def test_renormalised_kl_by_its_definition() -> None:
    kept = support_mask("union")
    ours, theirs = ((p * kept) / (p * kept).sum(-1, keepdim=True) for p in (S, T))
    terms = torch.where(kept, ours * (ours / theirs).log(), 0.0)
    value, _ = value_and_gradient(TopK(K, "union", "renormalise"))
    close(value, terms.sum(-1))


@every_support
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(
    ("fields", "full"),
    [
        ({"divergence": "reverse"}, ReverseKL()),
        ({"divergence": "forward"}, ForwardKL()),
        ({"divergence": "jsd", "beta": 0.3}, JSD(0.3)),
    ],
)
def test_u12_a_tail_makes_it_a_lower_bound(
    support: Any, k: int, fields: dict[str, Any], full: Divergence
) -> None:
    value, _ = value_and_gradient(TopK(k, support, "tail", **fields))
    exact, _ = value_and_gradient(full)
    assert (value <= exact + 1e-12).all()
    assert (value >= 0).all()
    assert (value > 0).any()
    assert (value < exact - 1e-3).any()


def test_a_tail_is_one_more_token() -> None:
    kept = support_mask("student")
    ours, theirs = (
        torch.cat([p[kept].view(ROWS, K), 1 - (p * kept).sum(-1, keepdim=True)], dim=-1)
        for p in (S, T)
    )
    expected = JSD(0.5)(ours.log(), theirs.log())
    value, _ = value_and_gradient(TopK(K, "student", "tail", divergence="jsd", beta=0.5))
    close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_that_rounds_to_nothing(dtype: torch.dtype) -> None:
    student = torch.tensor([[60.0, 61.0, -60.0, -60.0]], dtype=dtype)
    teacher = torch.tensor([[61.0, 60.0, -60.0, -60.0]], dtype=dtype)
    value, gradient = value_and_gradient(TopK(2, "student", "tail"), student, teacher)
    expected, slope = value_and_gradient(ReverseKL(), student, teacher)
    close(value, expected, atol=1e-5)
    close(gradient, slope, atol=1e-5)


DISJOINT = torch.arange(VOCABULARY, dtype=torch.float64)[None]


@every_variant
def test_an_empty_intersection_costs_nothing(variant: tuple[Any, ...]) -> None:
    divergence = make(variant, k=K, support="intersection")
    value, gradient = value_and_gradient(divergence, DISJOINT, -DISJOINT)
    assert value.tolist() == [0]
    assert gradient.abs().max() == 0
    elsewhere, _ = value_and_gradient(make(variant, k=K, support="union"), DISJOINT, -DISJOINT)
    assert elsewhere.abs() > 0.01


def test_eopd_renormalises_the_teacher_alone() -> None:
    kept = support_mask("teacher")
    theirs = (T * kept) / (T * kept).sum(-1, keepdim=True)
    terms = torch.where(kept, theirs * (theirs.log() - S.log()), 0.0)
    value, gradient = value_and_gradient(TopK(K, "teacher", "teacher", divergence="forward"))
    close(value, terms.sum(-1))
    close(gradient, S - theirs)  # cross entropy: also pushes down what is outside of K


def test_verl_forward_kl_is_clamped_and_then_has_no_gradient() -> None:
    bare, slope = value_and_gradient(TopK(K, "teacher", "none", divergence="forward"))
    value, gradient = value_and_gradient(TopK(K, "teacher", "none", "forward", clamp=True))
    # A student with more mass on K than the teacher has a negative sum.
    sharp, _ = value_and_gradient(TopK(K, "teacher", "none", "forward"), 2 * TEACHER)
    clamped, lost = value_and_gradient(
        TopK(K, "teacher", "none", "forward", clamp=True), 2 * TEACHER
    )
    assert (bare > 0).any()
    close(value, bare.clamp(min=0))
    close(gradient, slope * (bare > 0)[:, None])
    assert (sharp < 0).any()
    assert (clamped[sharp < 0] == 0).all()
    assert (lost[sharp < 0] == 0).all()


def test_a_teacher_without_mass_outside_its_top_k() -> None:
    theirs = TEACHER.masked_fill(~support_mask("teacher"), -torch.inf)
    both: tuple[Literal["none", "renormalise"], ...] = ("none", "renormalise")
    for normalise in both:
        divergence = TopK(K, "teacher", normalise)
        value, gradient = value_and_gradient(divergence, STUDENT, theirs)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        jsd = TopK(K, "union", normalise, divergence="jsd", beta=0.5)
        value, gradient = value_and_gradient(jsd, STUDENT, theirs)
        assert (value > 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", ["jsd", "mixed"])
def test_without_a_beta_both_sides_count_alike(divergence: Any) -> None:
    bare, half = (plain(K, "union", divergence=divergence, beta=beta) for beta in (None, 0.5))
    assert torch.equal(value_and_gradient(bare)[0], value_and_gradient(half)[0])


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    value, _ = value_and_gradient(plain(100, "union"))
    close(value, kl(S.log(), T.log()))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", [False, True])
def test_sdpo_is_that_of_trl(beta: float, tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    logits = STUDENT.clone().requires_grad_()
    expected = compute_topk_self_distillation_loss(
        logits, TEACHER, distillation_topk=K, distillation_alpha=beta, distillation_add_tail=tail
    )
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    normalise: Literal["tail", "renormalise"] = "tail" if tail else "renormalise"
    ours = TopK(K, "student", normalise, divergence="jsd", beta=beta)
    value, gradient = value_and_gradient(ours)
    close(value, expected.detach(), atol=1e-5)
    close(gradient, slope, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k is 0, expected at least 1"),
        ({"k": 1, "normalise": "renormalise"}, "one token renormalised"),
        ({"divergence": "forward", "gradient": "stop-gradient"}, "gradient is 'stop-gradient'"),
        ({"divergence": "jsd", "beta": 0.5, "gradient": "corrected"}, "gradient is 'corrected'"),
        ({"normalise": "tail", "gradient": "corrected"}, "sums are 1 already"),
        ({"normalise": "teacher"}, "normalise is 'teacher' with divergence 'reverse'"),
        ({"normalise": "tail", "clamp": True}, "clamp is true with normalise 'tail'"),
        ({"gradient": "stop-gradient", "clamp": True}, "clamp is true with normalise 'none'"),
        ({"beta": 0.5}, "beta is 0.5 with divergence 'reverse'"),
        ({"divergence": "jsd", "beta": 2.0}, "JSD: beta is 2.0"),
    ],
)
def test_meaningless_combinations_are_refused(fields: dict[str, Any], message: str) -> None:
    complete: dict[str, Any] = {"k": 4, "support": "student", "normalise": "none"}
    with pytest.raises(UserError, match=message) as caught:
        TopK(**(complete | fields))
    assert "\n" not in str(caught.value)


class Consumer:
    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence


def test_a_configuration_names_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Consumer, "consumer")
    fields = {"k": 100, "support": "student", "normalise": "tail", "divergence": "jsd", "beta": 0.5}
    chosen = {"class_path": "opd_lightning.losses.top_k.TopK", "init_args": fields}
    config = parser.parse_object({"consumer": {"divergence": chosen}})
    expected = TopK(100, "student", "tail", divergence="jsd", beta=0.5)
    assert parser.instantiate(config).consumer.divergence == expected
