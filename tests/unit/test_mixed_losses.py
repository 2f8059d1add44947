"""Methods with two losses, by token or by author, against their formulas on all sequences."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_lightning.losses.divergence import (
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import AOPD, DistiLLM2, EntropySwitch, TrOPD
from opd_lightning.models.student import Student
from opd_lightning.rules import RandomGate
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.training.composed import ComposedMethod
from tests.toy import (
    TOKENS,
    VISITED,
    VOCABULARY,
    applied,
    finite_difference,
    make_scored,
    opd_signal,
    random_logits,
    sequence_probs,
    token_logprobs,
    visit_probabilities,
)

ALL_FORWARD = TopK(k=VOCABULARY, support="teacher", normalise="none", divergence="forward")


def token_losses(
    method: ComposedMethod,
    at: Tensor,
    student: Tensor,
    teacher: Tensor,
    entropy: Tensor | None = None,
) -> Tensor:
    """Losses `[S, T]` of all sequences, differentiable in `student`, decided at `at`."""
    ((name, compare),) = method.comparisons().items()
    scored = make_scored(token_logprobs(at), token_logprobs(teacher), ids=TOKENS)
    if entropy is not None:
        theirs = replace(scored.teacher, entropy=entropy)
        scored = replace(scored, others={**scored.others, "teacher": theirs})
    scores = replace(scored.student, logprobs=token_logprobs(student))
    values = compare.function(student.log_softmax(-1), teacher.log_softmax(-1))[VISITED]
    signal = replace(opd_signal(scored), advantage=method.advantage(scored))
    return method.token_loss(scores, signal, scored, {name: values})


def gradient(
    method: ComposedMethod, logits: Tensor, teacher: Tensor, entropy: Tensor | None = None
) -> Tensor:
    """Return the expected gradient over all sequences, weighted by their probabilities."""
    student = logits.clone().requires_grad_()
    losses = token_losses(method, logits, student, teacher, entropy)
    (found,) = torch.autograd.grad((sequence_probs(logits)[:, None] * losses).sum(), student)
    return found


def aopd(divergence: Divergence) -> AOPD:
    return AOPD(Student("nowhere"), FrozenTeacher("nowhere"), divergence)


def test_aopd_has_the_gradient_of_its_formula() -> None:
    """Per prefix: -sum_{d > 0} S d grad log S + S(d <= 0) grad KL(S || T)."""
    logits, teacher = random_logits(0), random_logits(1)
    probs, target = logits.softmax(-1), teacher.log_softmax(-1)
    ratio = target - logits.log_softmax(-1)
    pull = torch.where(ratio > 0, -probs * ratio, 0.0)
    rest = torch.where(ratio > 0, 0.0, probs).sum(-1)
    visits = visit_probabilities(logits)

    def objective(at: Tensor) -> Tensor:
        pushed = (pull * at.log_softmax(-1)).sum(-1)
        return (visits * (pushed + rest * ReverseKL()(at.log_softmax(-1), target))).sum()

    found = gradient(aopd(ReverseKL()), logits, teacher)
    torch.testing.assert_close(found, finite_difference(objective, logits), atol=1e-7, rtol=1e-6)
    assert found.abs().max() > 1e-2
    # On the whole vocabulary the default's gradient is that of the reverse KL.
    default = TopK(k=VOCABULARY, support="teacher", normalise="none", gradient="corrected")
    torch.testing.assert_close(gradient(aopd(default), logits, teacher), found)


def test_aopd_compares_where_the_teacher_has_no_preference() -> None:
    student = torch.full((1, 3), -1.0)
    scored = make_scored(student, student + torch.tensor([[1.0, 0.0, -1.0]]))
    method = AOPD(Student("nowhere"), FrozenTeacher("nowhere"))
    assert method.pushes(opd_signal(scored), scored).tolist() == [[True, False, False]]


def test_tropd_is_on_average_the_mixture_of_its_two_losses() -> None:
    """Per prefix: -sum_v S min(1, T/S) d grad log S + sum_v (S - min(S, T)) grad KL(T || S)."""
    logits, teacher = random_logits(0), random_logits(1)
    probs, target = logits.softmax(-1), teacher.log_softmax(-1)
    ratio = target - logits.log_softmax(-1)
    inside = probs * ratio.exp().clamp(max=1)
    visits = visit_probabilities(logits)

    def objective(at: Tensor) -> Tensor:
        pushed = (-inside * ratio * at.log_softmax(-1)).sum(-1)
        local = ForwardKL()(at.log_softmax(-1), target)
        return (visits * (pushed + (1 - inside.sum(-1)) * local)).sum()

    exact = finite_difference(objective, logits)
    methods = [
        TrOPD(Student("nowhere"), FrozenTeacher("nowhere"), ALL_FORWARD, seed=seed)
        for seed in range(200)
    ]
    found = torch.stack([gradient(method, logits, teacher) for method in methods])
    error = found.std(0) / len(methods) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4.5 * error + 1e-7).all()
    assert (found.mean(0) - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], gradient(methods[0], logits, teacher))


def test_tropd_draws_apart_from_a_random_gate() -> None:
    """Half of the tokens that the gate chose are inside too, and not those of the lowest draws."""
    student = torch.full((400, 5), -1.0)
    ids = torch.arange(2000).view(400, 5)
    groups = list(range(400))
    scored = make_scored(student, student + torch.tensor(0.5).log(), ids=ids, groups=groups)
    method = TrOPD(Student("nowhere"), FrozenTeacher("nowhere"))
    signal, _ = applied(RandomGate(0.5), scored)
    inside = method.pushes(signal, scored)
    for chosen in (signal.mask, ~signal.mask):
        assert abs(inside[chosen].float().mean() - 0.5) < 4 * (0.25 / 1000) ** 0.5


def test_the_switch_is_opd_or_its_divergence() -> None:
    logits, teacher = random_logits(0), random_logits(1)
    target = teacher.log_softmax(-1)
    entropy = -(target.exp() * target).sum(-1)[VISITED]
    threshold = float(entropy.median())
    method = EntropySwitch(Student("nowhere"), FrozenTeacher("nowhere"), threshold, ForwardKL())
    assert (entropy > threshold).any()
    assert (entropy <= threshold).any()

    def objective(at: Tensor) -> Tensor:
        """Per prefix, one of the two losses: the teacher's entropy is the prefix's."""
        ours = at.log_softmax(-1)
        pushed = -(logits.softmax(-1) * (target - logits.log_softmax(-1)) * ours).sum(-1)
        unsure = -(target.exp() * target).sum(-1) > threshold
        local = ForwardKL()(ours, target)
        return (visit_probabilities(logits) * torch.where(unsure, local, pushed)).sum()

    found = gradient(method, logits, teacher, entropy)
    torch.testing.assert_close(found, finite_difference(objective, logits), atol=1e-7, rtol=1e-6)
    for at, divergence in ((-1.0, True), (99.0, False)):
        method.threshold = at
        alone = gradient(method, logits, teacher, entropy)
        assert (alone - found).abs().max() > 1e-3, divergence


def test_distillm2_has_a_divergence_for_each_author() -> None:
    logits, teacher = random_logits(0), random_logits(1)
    method = DistiLLM2(Student("nowhere"), FrozenTeacher("nowhere"), alpha=0.3)
    ours, theirs = logits.log_softmax(-1), teacher.log_softmax(-1)
    of = {name: c.function(ours, theirs)[VISITED] for name, c in method.comparisons().items()}
    scored = make_scored(token_logprobs(logits), token_logprobs(teacher), ids=TOKENS)
    given = torch.arange(len(TOKENS)) % 2 == 0
    scored.batch.demonstrated = given  # type: ignore[misc]
    found = method.token_loss(scored.student, opd_signal(scored), scored, of)
    expected = {True: SkewedForwardKL(0.3), False: SkewedReverseKL(0.3)}
    for kind, divergence in expected.items():
        assert torch.equal(found[given == kind], divergence(ours, theirs)[VISITED][given == kind])
    assert not method.has_advantage
    assert not method.averages_samples
    assert method.takes_demonstrations


@pytest.mark.parametrize("kind", [AOPD, TrOPD])
def test_equal_models_have_no_gradient(kind: type[AOPD] | type[TrOPD]) -> None:
    method = kind(Student("nowhere"), FrozenTeacher("nowhere"))
    logits = random_logits(0)
    found = gradient(method, logits, logits.clone())
    if kind is TrOPD:  # every token is inside
        assert found.abs().max() < 1e-15
    else:  # and here outside, where the corrected divergence is 0
        assert found.abs().max() < 1e-12
