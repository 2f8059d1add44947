"""The signal of micro-batches, after all rules of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from opd_lightning.processes import concatenate_ranks
from opd_lightning.rules.base import Rates, Rule, Scored, Signal, add_rates
from opd_lightning.training.outputs import checked_signal, checked_tokens
from opd_lightning.training.scoring import BatchScores
from opd_lightning.training.step_divisors import StepDivisors
from opd_lightning.types import TokenScores

if TYPE_CHECKING:
    from opd_lightning.training.composed import ComposedMethod


class Prepared(NamedTuple):
    """Scores and signal of a micro-batch, computed before its training pass."""

    others: Mapping[str, TokenScores]
    signal: Signal
    rates: Rates
    selected: int  # tokens of the whole step in the masks of its signals


def signal_of(
    method: ComposedMethod, scored: Scored, divisors: StepDivisors | None
) -> tuple[Signal, Rates]:
    """Return the signal of a micro-batch after all rules, and their rates.

    Args:
        method: Method with the rules.
        scored: Scores of the micro-batch.
        divisors: Where rules that observe the whole step put their rows; None if none does.
    """
    signal = _first_signal(method, scored)
    rates: Rates = {}
    for place, rule in enumerate(method.rules):
        if divisors is not None and rule.observes(scored.batch.totals.step):
            rows = rule.observe(signal, scored)
            assert rows is not None
            divisors.add(f"rule {place}", rows)
        signal = _checked(method, rule, rule.apply(signal, scored), signal, scored, rates)
    return signal, rates


@torch.no_grad()
def prepare_signals(method: ComposedMethod, results: Sequence[BatchScores]) -> list[Prepared]:
    """Return the signals of a step from the scores of all its micro-batches. Collective."""
    scored = [result.scored for result in results]
    signals = [_first_signal(method, one) for one in scored]
    rates: list[Rates] = [{} for _ in results]
    for rule in method.rules:
        is_wide = rule.observes(scored[0].batch.totals.step)
        observed = _observe(rule, signals, scored) if is_wide else None
        for i, one in enumerate(scored):
            result = rule.apply(signals[i], one, observed)
            signals[i] = _checked(method, rule, result, signals[i], one, rates[i])
    counts = torch.stack([signal.mask.sum() for signal in signals]).sum()
    selected = int(concatenate_ranks(counts[None, None]).sum())
    return [
        Prepared(result.others, signal, rate, selected)
        for result, signal, rate in zip(results, signals, rates, strict=True)
    ]


def _first_signal(method: ComposedMethod, scored: Scored) -> Signal:
    """Return the signal before all rules."""
    found = method.advantage(scored)
    advantage = checked_tokens(method, "advantage", found, scored.batch.response_mask).detach()
    mask = method.loss_mask(scored.batch)
    method.skipped.record_part(scored.batch, mask, method, "advantage", advantage)
    return Signal(advantage=advantage, weight=torch.ones_like(advantage), mask=mask)


def _checked(
    method: ComposedMethod, rule: Rule, result: Any, before: Signal, scored: Scored, rates: Rates
) -> Signal:
    """Return the signal that a rule returned for `before`, and add its rates to `rates`."""
    signal, more = checked_signal(rule, result, before)
    add_rates(rates, more)
    values = signal.advantage * signal.weight
    method.skipped.record_part(scored.batch, signal.mask, rule, "signal", values)
    return signal


def _observe(rule: Rule, signals: Sequence[Signal], scored: Sequence[Scored]) -> Tensor | None:
    """Return the rows that a rule observes in all micro-batches, of all ranks. Collective."""
    seen = [rule.observe(s, o) for s, o in zip(signals, scored, strict=True)]
    rows = [row for row in seen if row is not None]
    return concatenate_ranks(torch.cat(rows)) if rows else None
