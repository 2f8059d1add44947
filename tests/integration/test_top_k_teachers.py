"""A top-k teacher gives the loss of a teacher with the whole distribution."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import ServerAwayError, UserError
from opd_lightning.losses.divergence import ReverseKL
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import OPD, DivergenceOPD
from opd_lightning.models.head import TopLogprobs
from opd_lightning.rules import EntropyGatedForwardKL
from opd_lightning.teachers import FrozenTeacher, TopKTeacher
from opd_lightning.types import RolloutBatch, TokenScores
from tests.integration.test_methods import prompts, run, student, teacher  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("in_lab")


class Reticent(TopKTeacher):
    """A frozen teacher that answers exactly what it is asked, and keeps count."""

    scores_given_ids = True

    def __init__(self, path: str = "lab/arithmetic/teacher") -> None:
        self.whole = FrozenTeacher(path)
        self.source = self.whole.source
        self.expected = self.asked = 0

    def load(self, *args: Any) -> None:
        self.whole.load(*args)

    def prefetch(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:
        self.expected += 1

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        self.asked += 1
        scores = self.whole.score(batch, view, top_k=top_k)
        return replace(scores, entropy=torch.full_like(scores.entropy, torch.nan))

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        scores = self.score(batch, view, top_k=top_k)
        states = self.whole.states(batch, view)
        with torch.no_grad():
            logprobs = states.head.finish(states.head.project(states.hidden)).log_softmax(-1)
        ids = scores.top_ids[batch.response_mask] if ids is None else ids
        return scores, TopLogprobs(ids, logprobs.gather(1, ids))


DIVERGENCES = ("reverse", "forward", "jsd")
NORMALISATIONS = ("none", "renormalise", "tail")
SUPPORTS = ("student", "teacher", "intersection")
# Every pair of two of them is among those that are not slow.
KINDS = [
    pytest.param(
        SUPPORTS[s], NORMALISATIONS[n], DIVERGENCES[d],
        marks=[] if (s + n + d) % 3 == 0 else pytest.mark.slow,
    )
    for s, n, d in product(range(3), repeat=3)
]  # fmt: skip


@pytest.mark.parametrize(("support", "normalise", "divergence"), KINDS)
def test_same_gradients(
    support: Any,
    normalise: Any,
    divergence: Any,
    prompts: Path,  # noqa: F811
) -> None:
    loss = TopK(k=5, support=support, normalise=normalise, divergence=divergence)

    def method(by: Any) -> DivergenceOPD:
        return DivergenceOPD(teacher=by, divergence=loss, overlap_top_k=3, **student())

    whole = run((lambda: method(teacher()), dict), prompts, steps=1)
    part = run((lambda: method(Reticent()), dict), prompts, steps=1)
    assert max(g.abs().max() for g in whole.gradients[0].values()) > 1e-4
    for name, gradient in whole.gradients[0].items():
        torch.testing.assert_close(part.gradients[0][name], gradient, atol=1e-7, rtol=1e-5)
    logged = set(whole.logged[0]) - set(part.logged[0])
    assert logged == {"entropy/teacher", "entropy/gap"}, "what nobody told is not logged"
    assert part.logged[0]["overlap/ratio"] == pytest.approx(whole.logged[0]["overlap/ratio"])


def test_an_error_of_a_late_answer_is_its_own(
    prompts: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise ServerAwayError("no answer")

    monkeypatch.setattr(Reticent, "score_top", away)
    loss = TopK(k=5, support="student", normalise="tail")
    method = DivergenceOPD(teacher=Reticent(), divergence=loss, **student())
    with pytest.raises(ServerAwayError, match="no answer"):
        run((lambda: method, dict), prompts, steps=1)


def test_an_entropy_that_nobody_tells_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = OPD(teacher=Reticent(), terms=[EntropyGatedForwardKL()], **student())
    gated.check()
    monkeypatch.setattr(Reticent, "provides_entropy", False)
    with pytest.raises(UserError, match=r"EntropyGatedForwardKL reads .* Reticent cannot"):
        gated.check()


def test_sampled_tokens_are_announced_before_they_are_asked_for(prompts: Path) -> None:  # noqa: F811
    reticent = Reticent()
    run((lambda: OPD(teacher=reticent, **student()), dict), prompts, micro_batches=3, steps=2)
    assert reticent.expected == reticent.asked == 6


@pytest.mark.parametrize(
    ("divergence", "given", "complaint"),
    [
        (ReverseKL(), True, "which Reticent cannot"),
        (TopK(k=5, support="union", normalise="tail"), True, "support is 'union'"),
        (TopK(k=5, support="student", normalise="tail"), False, "expected teacher or intersection"),
    ],
)
def test_what_it_cannot_tell_is_refused(
    divergence: Any, given: bool, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reticent, "scores_given_ids", given)
    with pytest.raises(ValueError, match=complaint):
        DivergenceOPD(teacher=Reticent(), divergence=divergence, **student()).check()
