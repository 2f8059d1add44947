"""Methods composed of a signal, rules and loss terms."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from opd_lightning.losses.reduction import aggregate
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.models.student import Student
from opd_lightning.rules.base import Compare, Rule, Scored, Signal
from opd_lightning.rules.terms import Term
from opd_lightning.teachers.base import Ask, Teacher
from opd_lightning.terminal.progress import Progress
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.checks import check_parts, corrects_sampler
from opd_lightning.training.outputs import checked_tokens
from opd_lightning.training.rule_states import restore_states, states_of
from opd_lightning.training.scoring import LOSS, BatchScores, prefetch_scores, score_batch
from opd_lightning.training.signal import Prepared, prepare_signals, signal_of
from opd_lightning.training.step_divisors import StepDivisors, divide_the_loss
from opd_lightning.types import RolloutBatch, TokenScores, Totals


class ComposedMethod(DistillationModule):
    """Method made of teachers, a signal, rules that change the signal, and loss terms.

    A subclass defines its teachers and their views (`asks`), its advantage (`advantage`, by default
    d_t of the teacher named "teacher") or the divergence that is its loss (a comparison named
    "loss"), and its built-in rules and terms (`own_rules`, `own_terms`). If its loss is neither a
    policy gradient nor a divergence, or mixes the two by token, it overrides `token_loss`.

    Args:
        student: The model that learns.
        rules: Rules applied after the method's built-in rules, in this order.
        terms: Loss terms added to the method's loss, after its built-in terms.
        imitation: Weight of a separate cross-entropy loss on responses that the student did not
            write (the teacher's, recorded ones). With None they go through the method's loss.
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
        # Only for steps that are scored before they train: scores of all micro-batches but the
        # first, then the signals of the micro-batches that remain to be trained on.
        self._scored: list[BatchScores] | None = None
        self._prepared: deque[Prepared] = deque()
        # Only for steps whose gradients are divided after the last micro-batch.
        self._divisors: StepDivisors | None = None

    # Hooks of a subclass ------------------------------------------------------------------

    reads_entropy = False  # whether it reads the entropy of the teacher's full distribution

    def advantage(self, scored: Scored) -> Tensor:
        """Return the advantage of the sampled tokens, `[B, R]` nats."""
        return scored.log_ratio

    def own_rules(self) -> Sequence[Rule]:
        """Return the method's built-in rules, applied before the user's `rules`."""
        return ()

    def own_terms(self) -> Sequence[Term]:
        """Return the method's built-in loss terms, added before the user's `terms`."""
        return ()

    def comparisons(self) -> Mapping[str, Compare]:
        """Return the functions of whole distributions, by name; "loss" is the token loss."""
        return {}

    def token_loss(
        self,
        student: TokenScores,
        signal: Signal,
        scored: Scored,
        values: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the loss of every token, `[B, R]` nats, before weights, mask and aggregation.

        The default is the comparison named "loss", or else the policy gradient of
        `signal.advantage`. An override may mix the two by token with `torch.where`. The result must
        be finite also where `signal.mask` is False: the mask removes a NaN, but not its gradient.

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
        """Return the surrogate loss of `signal.advantage`, `[B, R]`."""
        batch = scored.batch
        return self.surrogate(
            student.logprobs, signal.advantage, batch.behaviour_logprobs, batch.on_policy
        )

    # Loss ---------------------------------------------------------------------------------

    @property
    def rules(self) -> list[Rule]:
        return [*self.own_rules(), *self.extra_rules]

    @property
    def terms(self) -> list[Term]:
        return [*self.own_terms(), *self.extra_terms]

    def loss(self, batch: RolloutBatch) -> Tensor:
        known = self._prepared[0].others if self._prepared else {}
        results = self._score(batch, known)
        if self._scored is not None:
            self._prepared.extend(prepare_signals(self, [results, *self._scored]))
            self._scored = None
        prepared = self._prepared.popleft() if self._prepared else None
        scored, student, values = results.scored, results.student, results.values
        self.compare_with_engine(batch, student)
        mask = self.loss_mask(batch)
        self.skipped.record(batch, mask, student=student, **scored.others)
        if "teacher" in scored.others:
            self.note_signal(batch, student, scored.teacher, mask)
        if prepared is None:
            signal, rates = signal_of(self, scored, self._divisors)
        else:
            signal, rates = prepared.signal, prepared.rates
        self.note_rules(scored, signal, rates)

        found = self.token_loss(student, signal, scored, values)
        token_loss = checked_tokens(self, "token_loss", found, batch.response_mask)
        self.skipped.record_part(batch, signal.mask, self, "loss", token_loss)
        totals = batch.totals.all if self.imitation is None else batch.totals.written
        selected = totals
        if self.aggregation == "mask-mean" and self._divisors is not None:
            counts = torch.stack([signal.mask.sum(), batch.response_mask.sum()])
            self._divisors.add("mask-mean", counts[None])
        elif self.aggregation == "mask-mean":
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
            found = term.token_loss(student, scored, values)
            token_loss = checked_tokens(term, "token_loss", found, batch.response_mask)
            mask = self.loss_mask(batch, term.names_read())
            self.skipped.record_part(batch, mask, term, "loss", token_loss)
            loss = loss + aggregate(token_loss, mask, totals, mode)
            self.rates.update(batch, {f"term/{term.name}": torch.where(mask, token_loss, 0.0)})
        if self.imitation is not None:
            weight = value_at(self.imitation, batch.totals.step)
            self.rates.update(batch, {"imitation": loss.new_full((1, 1), weight)})
            if weight:
                mask = batch.response_mask & batch.demonstrated[:, None]
                imitated = aggregate(-student.logprobs, mask, batch.totals.demonstrated, mode)
                loss = loss + weight * imitated
        return loss

    def prepare_step(self, batches: Sequence[RolloutBatch]) -> None:
        """Score the step's micro-batches, if a rule or the normaliser needs them all.

        Adds a forward pass over all micro-batches but the first, which is scored by its training
        pass: of the student, and of teachers whose distributions are compared. Other teachers are
        scored here and reused. No pass is needed if the loss can be divided after the last
        micro-batch.
        """
        self._scored, self._divisors = None, None
        self._prepared.clear()
        for batch in batches:
            prefetch_scores(self.all_asks(), self.all_comparisons(), batch, self.overlap_top_k)
        step = batches[0].totals.step
        if not self._reads_the_step(step):
            return
        later = batches[1:]
        if not self.scores_ahead(step, len(batches)):
            self._divisors = StepDivisors()
            return
        with (
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),
            Progress("score", len(later), "micro-batch", within=True) as bar,
        ):
            self._scored = [self._score(batch.to(self.device)) for batch in bar.each(later)]

    def _reads_the_step(self, step: int) -> bool:
        """Return whether a rule or the normaliser needs all micro-batches of a step."""
        return self.aggregation == "mask-mean" or any(r.observes(step) for r in self.rules)

    def scores_ahead(self, step: int, micro_batches: int) -> bool:
        """Return whether all micro-batches of a step but the first are scored before training."""
        adds = bool(self.terms) or self.imitation is not None
        divides = micro_batches > 1 and not adds and divide_the_loss(self.rules, step)
        return self._reads_the_step(step) and not divides

    def loss_factor(self) -> float:
        return 1.0 if self._divisors is None else self._divisors.factor()

    def loss_mask(self, batch: RolloutBatch, names: Set[str] | None = None) -> Tensor:
        """Return the mask `[B, R]` of a loss that reads the asks called `names`.

        It has all tokens but the imitated ones, in rows with the views of these asks. `names` of
        None are those that the method's own loss and its rules read.
        """
        names = self._names_read() if names is None else names
        mask = batch.response_mask & self._has_views(batch, names)
        return mask if self.imitation is None else mask & ~batch.demonstrated[:, None]

    def _names_read(self) -> set[str]:
        """Return the names in `all_asks` that the method's own loss and its rules read."""
        names = set(self.asks())
        for rule in self.rules:
            names |= rule.names_read()
        return names

    def _has_views(self, batch: RolloutBatch, names: Set[str]) -> Tensor:
        """Return the mask `[B, 1]` of rows that have the views of the asks called `names`."""
        asks = self.all_asks()
        rows = [batch.views[asks[name].view].available for name in names]
        return torch.stack([torch.ones_like(batch.on_policy), *rows]).all(0)[:, None]

    def _score(
        self, batch: RolloutBatch, known: Mapping[str, TokenScores] | None = None
    ) -> BatchScores:
        return score_batch(
            self.student,
            batch,
            asks=self.all_asks(),
            comparisons=self.all_comparisons(),
            known=known or {},
            top_k=self.overlap_top_k,
            timer=self.timer,
            sums_loss=self.sums_loss(batch),
        )

    def sums_loss(self, batch: RolloutBatch) -> bool:
        """Return whether the loss is a multiple of the sum of the comparison named "loss".

        That is known before the forward pass where nothing weighs tokens or leaves some out.
        """
        weighs = self.rules or self.terms or self.imitation is not None
        overridden = type(self).token_loss is not ComposedMethod.token_loss
        if self.aggregation != "token-mean" or weighs or overridden:
            return False
        return LOSS in self.comparisons() and bool(self._has_views(batch, self._names_read()).all())

    # Parts and properties -----------------------------------------------------------------

    def all_asks(self) -> Mapping[str, Ask]:
        asks = dict(self.asks())
        for term in self.terms:
            asks |= term.asks()
        return asks

    def all_comparisons(self) -> dict[str, Compare]:
        comparisons = dict(self.comparisons())
        for rule in self.rules:
            comparisons |= rule.comparisons()
        for term in self.terms:
            comparisons |= term.comparisons()
        return comparisons

    def compared_teachers(self) -> list[Teacher]:
        asks = self.all_asks()
        others = {compare.other for compare in self.all_comparisons().values()}
        return [ask.teacher for name, ask in asks.items() if name in others]

    @property
    def needs_groups(self) -> bool:
        return any(rule.needs_groups for rule in self.rules)

    @property
    def needs_rewards(self) -> bool:
        parts: list[Rule | Term] = [*self.rules, *self.terms]
        return self.needs_groups or any(part.needs_rewards for part in parts)

    @property
    def takes_demonstrations(self) -> bool:
        return self.imitation is not None or not self.has_advantage

    @property
    def has_advantage(self) -> bool:
        """Return whether the token loss reads `signal.advantage`; divergences do not."""
        return LOSS not in self.comparisons()

    @property
    def loss_averages_samples(self) -> bool:
        """Return whether `token_loss` is a mean over sampled tokens, rules and terms aside."""
        overridden = type(self).token_loss is not ComposedMethod.token_loss
        return self.has_advantage or overridden

    @property
    def averages_samples(self) -> bool:
        weighs = any(rule.corrects_sampler for rule in self.rules)
        estimates = any(term.averages_samples for term in self.terms)
        return self.loss_averages_samples or weighs or estimates

    @property
    def corrects_staleness(self) -> bool:
        return not self.has_advantage or corrects_sampler(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if states := states_of(self.rules):
            checkpoint["rules"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        restore_states(self.rules, checkpoint.get("rules", {}))

    def check(self) -> None:
        check_parts(self)
