"""GOLD: whole distributions compared between models with different tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.alignment import HybridULD
from opd_lightning.losses.divergence import JSD
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import kept
from opd_lightning.teachers.base import Teacher
from opd_lightning.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_lightning.training.divergence import DivergenceMethod
from opd_lightning.types import RolloutBatch, TokenScores


@dataclass(frozen=True)
class _GroupEnds(Rule):
    """Keep the tokens that end a group of the teacher's tokens."""

    ignores_weights = True

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ends = scored.teacher.ends
        assert ends is not None
        return kept(signal, ends), {}


class GOLD(DivergenceMethod):
    """General on-policy logit distillation across tokenizers (TRL's GOLD trainer; ULD, 2402.12030).

        L   = mean over responses of the mean over groups g of L_g
        L_g = w JSD_beta(S_g, T_g on shared tokens) + (1 - w) sum_i |S_g(i) - T_g(i)| on the others

    A group is the shortest run of tokens on both sides that ends at the same byte. Its distribution
    is that of its last token times the probability of its earlier ones (TRL's merge "bayesian").
    JSD is that of `GKD`, on probabilities that are not renormalised; S_g(i) is the i-th largest
    probability of a token that the other vocabulary lacks; w is the shared part of the teacher's
    vocabulary. `hybrid` False is ULD: the sorted probabilities of all tokens. With a teacher that
    has the student's tokenizer, every group is one token and everything is shared: a plain JSD.

    Differences to TRL's code. Its default merge "observed" takes the distribution of the first
    token, at logits one position late. It pairs tokens by their names; here by their bytes, so that
    " the" of a byte-level tokenizer and of SentencePiece are a pair, and so are the two ends of
    sequence. It leaves out the last token of both sides; here the end of a response is a group of
    its own. The temperature is the sampler's. Its w counts the rows of the teacher's head, here the
    tokens of its vocabulary. Its lambda is `data.mix: {recorded: 0.5, whole_steps: true}`.

    Args:
        student: The model to train.
        teacher: A `CrossTokenizerTeacher`, or one in this process with the student's tokenizer.
        beta: Weight of the teacher in JSD's mixture: 0 is the forward KL, 1 the reverse KL.
        hybrid: Whether shared tokens are compared one by one. False is ULD.
        shared_weight: w; None takes the shared part of the teacher's vocabulary.
        aggregation: See `DistillationModule`; groups count as tokens, except in "token-mean",
            which divides their sum by the number of the student's tokens.
        shared: Arguments of `ComposedMethod` and `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        beta: float = 0.5,
        hybrid: bool = True,
        shared_weight: float | None = None,
        aggregation: Aggregation = "seq-mean-token-mean",
        **shared: Any,
    ) -> None:
        if not hybrid and (beta, shared_weight) != (0.5, None):
            raise UserError(
                f"GOLD: got beta {beta} and shared_weight {shared_weight} with hybrid false, which "
                "compares sorted probabilities alone; leave them out"
            )
        if shared_weight is not None and not 0 <= shared_weight <= 1:
            raise UserError(f"shared_weight: got {shared_weight}, expected a number from 0 to 1")
        divergence = HybridULD(JSD(beta=beta), hybrid, shared_weight)
        super().__init__(student, teacher, "student", divergence, aggregation=aggregation, **shared)

    def own_rules(self) -> Sequence[Rule]:
        return (_GroupEnds(),) if self.teacher.has_own_tokenizer else ()

    def check(self) -> None:
        super().check()
        for name, ask in self.all_asks().items():
            if ask.teacher is not self.teacher and any(
                part.has_own_tokenizer for part in ask.teacher.parts()
            ):
                raise UserError(
                    f"{name}: got a {type(ask.teacher).__name__} with its own tokenizer, but GOLD "
                    "compares groups of tokens with its teacher alone; use a model with the "
                    "student's tokenizer"
                )

    def note_signal(
        self, batch: RolloutBatch, student: TokenScores, teacher: TokenScores, mask: Tensor
    ) -> None:
        super().note_signal(batch, student, teacher, mask)
        if isinstance(self.teacher, CrossTokenizerTeacher):
            share = student.logprobs.new_full((1, 1), self.teacher.shared_vocabulary)
            self.rates.update(batch, {"signal/shared_vocabulary": share})
