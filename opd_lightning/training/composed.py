"""A method as a signal and some rules: what all distillation methods are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_lightning.losses.reduction import aggregate
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.models.student import Student
from opd_lightning.processes import concatenate_ranks
from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal, add_rates
from opd_lightning.rules.terms import Term
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.terminal.progress import Progress
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.checks import check_parts, corrects_sampler
from opd_lightning.training.scoring import LOSS, Answers, announce, ask_everybody
from opd_lightning.types import RolloutBatch, TokenScores, Totals


class _Prepared(NamedTuple):
    """What is known of a micro-batch before its own training pass."""

    others: Mapping[str, TokenScores]
    signal: Signal
    rates: Rates
    selected: int  # tokens of the whole step that take part


class ComposedMethod(DistillationModule):
    """Ask the teachers, make a signal, let the rules shape it, weigh the tokens' losses.

    A subclass says whom it asks (`asks`), what its advantage is (`advantage`, by default d_t of the
    one it calls "teacher") or which divergence is its loss (a comparison named "loss"), and which
    rules and terms are its own (`own_rules`, `own_terms`). One whose loss is neither of the two, or
    both by token, overrides `token_loss`.

    Args:
        student: The model that learns.
        rules: Run after the method's own rules, in this order.
        terms: Losses beside the method's own, after the terms that it brings itself.
        imitation: Weight of the cross-entropy on responses that the student did not write (the
            teacher's, recorded ones), apart from the rest. None lets the method treat them as it
            treats all.
        surrogate: Importance ratio and clip of policy-gradient methods.
        shared: The arguments of `DistillationModule`.
    """

    def __init__(
        self,
        student: Student,
        *,
        rules: list[Rule] | None = None,
        terms: list[Term] | None = None,
        imitation: float | Schedule | None = None,
        surrogate: Surrogate = Surrogate(),  # noqa: B008 - frozen, and shown by --help
        **shared: Any,
    ) -> None:
        super().__init__(student, **shared)
        self.extra_rules = rules or []
        self.extra_terms = terms or []
        self.imitation = imitation
        self.surrogate = surrogate
        self._prepared: deque[_Prepared] = deque()

    # What a method writes -----------------------------------------------------------------

    def advantage(self, scored: Scored) -> Tensor:
        """What the sampled tokens' log-probs are pushed by, `[B, R]` nats."""
        return scored.log_ratio

    def own_rules(self) -> Sequence[Rule]:
        """The rules that make the method what it is; they run first."""
        return ()

    def own_terms(self) -> Sequence[Term]:
        """The losses that belong to the method; they come before the user's `terms`."""
        return ()

    def comparisons(self) -> Mapping[str, Compare]:
        """Whole distributions that the method reads; one named "loss" is the token loss."""
        return {}

    def token_loss(
        self,
        student: TokenScores,
        signal: Signal,
        scored: Scored,
        values: Mapping[str, Tensor],
    ) -> Tensor:
        """Loss of every token, `[B, R]` nats, before weights, mask and aggregation.

        The default is the comparison named "loss", or else the policy gradient of
        `signal.advantage`. An override may mix the two by token, with a `torch.where`. It must be
        finite also where `signal.mask` is False: a NaN there is masked, its gradient is not.

        Args:
            student: Scores of the student; `logprobs` carry the gradient.
            signal: Signal after all rules, detached.
            scored: Scores of all models, detached, and the micro-batch.
            values: Values `[B, R]` of `all_comparisons`, by name, with their gradient.
        """
        if LOSS in values:
            return values[LOSS]
        return self.policy_gradient(student, signal, scored)

    def policy_gradient(self, student: TokenScores, signal: Signal, scored: Scored) -> Tensor:
        """The surrogate loss of `signal.advantage`, `[B, R]`."""
        batch = scored.batch
        return self.surrogate(
            student.logprobs, signal.advantage, batch.behaviour_logprobs, batch.on_policy
        )

    # The whole ----------------------------------------------------------------------------

    @property
    def rules(self) -> list[Rule]:
        return [*self.own_rules(), *self.extra_rules]

    @property
    def terms(self) -> list[Term]:
        return [*self.own_terms(), *self.extra_terms]

    def loss(self, batch: RolloutBatch) -> Tensor:
        prepared = self._prepared.popleft() if self._prepared else None
        answers = self._score(batch, prepared.others if prepared else {})
        scored, student, values = answers.scored, answers.student, answers.values
        self.compare_with_engine(batch, student)
        mask = self._learnt(batch) & self._answered(batch)
        self.skipped.look(batch, mask, student=student, **scored.others)
        if "teacher" in scored.others:
            self.note_signal(batch, student, scored.teacher, mask)
        if prepared is None:
            signal = self._first_signal(scored)
            rates: Rates = {}
            for rule in self.rules:
                signal, more = rule.apply(signal, scored)
                add_rates(rates, more)
        else:
            signal, rates = prepared.signal, prepared.rates
        self.note_rules(scored, signal, rates)

        token_loss = self.token_loss(student, signal, scored, values)
        totals = batch.totals.all if self.imitation is None else batch.totals.written
        selected = totals
        if self.aggregation == "mask-mean":
            assert prepared is not None
            selected = Totals(prepared.selected, totals.sequences)
        loss = aggregate(signal.weight * token_loss, signal.mask, selected, self.aggregation)
        return loss + self._terms(batch, student, scored, values, totals)

    def _terms(
        self,
        batch: RolloutBatch,
        student: TokenScores,
        scored: Scored,
        values: Mapping[str, Tensor],
        totals: Totals,
    ) -> Tensor:
        mode = "token-mean" if self.aggregation == "mask-mean" else self.aggregation
        loss = student.logprobs.new_zeros(())
        for term in self.terms:
            token_loss = term.token_loss(student, scored, values)
            loss = loss + aggregate(token_loss, self._learnt(batch), totals, mode)
            self.rates.update(batch, {f"term/{term.name}": token_loss})
        if self.imitation is not None:
            weight = value_at(self.imitation, batch.totals.step)
            self.rates.update(batch, {"imitation": loss.new_full((1, 1), weight)})
            if weight:
                mask = batch.response_mask & batch.demonstrated[:, None]
                imitated = aggregate(-student.logprobs, mask, batch.totals.demonstrated, mode)
                loss = loss + weight * imitated
        return loss

    def prepare_step(self, batches: Sequence[RolloutBatch]) -> None:
        """Let the rules see the whole step, where one of them or the normaliser must.

        Costs the student one forward pass more, and teachers whose whole distribution is compared;
        the others are asked here and not again.
        """
        self._prepared.clear()
        for batch in batches:
            announce(self.all_asks(), self.all_comparisons(), batch, self.overlap_top_k)
        if self.aggregation != "mask-mean" and not any(rule.step_wide for rule in self.rules):
            return
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            with Progress("score", len(batches), "micro-batch", within=True) as bar:
                answers = [self._score(batch.to(self.device)) for batch in bar.each(batches)]
            scored = [answer.scored for answer in answers]
            signals = [self._first_signal(one) for one in scored]
            rates: list[Rates] = [{} for _ in batches]
            for rule in self.rules:
                observed = self._observe(rule, signals, scored) if rule.step_wide else None
                for i, one in enumerate(scored):
                    signals[i], more = rule.apply(signals[i], one, observed)
                    add_rates(rates[i], more)
            counts = torch.stack([signal.mask.sum() for signal in signals]).sum()
            selected = int(concatenate_ranks(counts[None, None]).sum())
        self._prepared.extend(
            _Prepared(answer.others, signal, rate, selected)
            for answer, signal, rate in zip(answers, signals, rates, strict=True)
        )

    def _observe(self, rule: Rule, signals: list[Signal], scored: list[Scored]) -> Tensor | None:
        seen = [rule.observe(s, o) for s, o in zip(signals, scored, strict=True)]
        rows = [row for row in seen if row is not None]
        return concatenate_ranks(torch.cat(rows)) if rows else None

    def _first_signal(self, scored: Scored) -> Signal:
        advantage = self.advantage(scored).detach()
        return Signal(
            advantage=advantage,
            weight=torch.ones_like(advantage),
            mask=self._learnt(scored.batch) & self._answered(scored.batch),
        )

    def _learnt(self, batch: RolloutBatch) -> Tensor:
        """`[B, R]` tokens of the method's own loss: all, or all but those that are imitated."""
        if self.imitation is None:
            return batch.response_mask
        return batch.response_mask & ~batch.demonstrated[:, None]

    def _answered(self, batch: RolloutBatch) -> Tensor:
        """`[B, 1]` rows that have every view that is asked about."""
        rows = [batch.views[view].available for view in self.views()]
        return torch.stack([torch.ones_like(batch.on_policy), *rows]).all(0)[:, None]

    def _score(
        self, batch: RolloutBatch, known: Mapping[str, TokenScores] | None = None
    ) -> Answers:
        return ask_everybody(
            self.student,
            batch,
            asks=self.all_asks(),
            comparisons=self.all_comparisons(),
            known=known or {},
            top_k=self.overlap_top_k,
            timer=self.timer,
        )

    # What it is made of -------------------------------------------------------------------

    def all_asks(self) -> Mapping[str, Ask]:
        asks = dict(self.asks())
        for term in self.terms:
            asks |= term.asks()
        return asks

    def all_comparisons(self) -> dict[str, Compare]:
        wishes = dict(self.comparisons())
        for rule in self.rules:
            wishes |= rule.comparisons()
        for term in self.terms:
            wishes |= term.comparisons()
        return wishes

    def compared_teachers(self) -> list[Teacher]:
        asks = self.all_asks()
        others = {wish.other for wish in self.all_comparisons().values()}
        return [ask.teacher for name, ask in asks.items() if name in others]

    @property
    def needs_groups(self) -> bool:
        return any(rule.needs_groups for rule in self.rules)

    @property
    def needs_rewards(self) -> bool:
        return self.needs_groups or any(rule.needs_rewards for rule in self.rules)

    @property
    def takes_demonstrations(self) -> bool:
        return self.imitation is not None or LOSS in self.comparisons()

    @property
    def corrects_staleness(self) -> bool:
        return LOSS in self.comparisons() or corrects_sampler(self)

    def check(self) -> None:
        check_parts(self)
