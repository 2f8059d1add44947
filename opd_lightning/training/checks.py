"""Checks that the parts of a composed method fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError
from opd_lightning.losses.alignment import HybridULD
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.losses.top_k import TopK
from opd_lightning.models.student import KEPT_MASS
from opd_lightning.rules.base import Rule
from opd_lightning.teachers.base import (
    Ask,
    GroupTeacher,
    Teacher,
    provides_distributions,
    provides_top_k,
)
from opd_lightning.training.scoring import LOSS

if TYPE_CHECKING:
    from opd_lightning.rules.terms import Term
    from opd_lightning.training.composed import ComposedMethod

STUDENT = "student"  # the student's scores, beside those of the models that are asked


def check_parts(composed: ComposedMethod) -> None:
    """Raise UserError, before any weight is loaded, if an input of a part is not provided."""
    _check_asks(composed)
    _check_names(composed)
    _check_tokens(composed)
    _check_rules(composed)
    _check_surrogate(composed)
    _check_comparisons(composed)
    _check_entropy(composed)


def _check_rules(composed: ComposedMethod) -> None:
    """Raise UserError if a rule reads scores, or an advantage, that the method lacks."""
    method, asks = type(composed).__name__, composed.all_asks()
    for rule in composed.rules:
        name = type(rule).__name__
        if rule.step_wide and type(rule).observe is Rule.observe:
            raise UserError(
                f"rules: {name} is step_wide, but has no `observe`, from which the step's values "
                "come; define it, or leave step_wide out"
            )
        for need in rule.needs:
            if need not in asks:
                raise UserError(
                    f"rules: {name} reads the scores called {need!r}, but {method} asks for "
                    f"{', '.join(asks) or 'none'}; choose a method that has them"
                )
        if rule.shapes_advantage and not composed.has_advantage:
            raise UserError(
                f"rules: {name} changes the advantage, but {method}'s loss is a divergence, "
                "which has none; use a rule that weighs or masks, or a sampled method"
            )


def _check_surrogate(composed: ComposedMethod) -> None:
    """Raise UserError if an importance ratio has no meaning, or corrects what a rule corrects."""
    method = type(composed).__name__
    if not composed.has_advantage and composed.surrogate != Surrogate():
        raise UserError(
            f"surrogate: got {composed.surrogate}, but {method}'s loss is a divergence, which has "
            "no importance ratio; leave it out"
        )
    corrected = any(rule.corrects_sampler for rule in composed.rules)
    if composed.surrogate.ratio_to == "sampler" and corrected:
        raise UserError(
            f"surrogate.ratio_to: got 'sampler', which corrects for the engine in full, but "
            f"{method} has a rule that does so too; set importance_cap to null, or ratio_to to "
            "'trainer'"
        )


def _check_comparisons(composed: ComposedMethod) -> None:
    """Raise UserError if a teacher cannot provide the log-probs that a comparison reads."""
    method, asks = type(composed).__name__, composed.all_asks()
    for name, compare in composed.all_comparisons().items():
        if compare.other is None:
            continue
        if compare.other not in asks:
            raise UserError(
                f"{name} compares with the distribution of {compare.other!r}, but {method} asks "
                f"for {', '.join(asks) or 'none'}; choose a method that has it"
            )
        _check_known(method, asks[compare.other].teacher, compare.function)


def _check_entropy(composed: ComposedMethod) -> None:
    """Raise UserError if a part reads the entropy of a teacher that does not provide it."""
    parts: list[ComposedMethod | Rule | Term] = [composed, *composed.rules, *composed.terms]
    reading = [type(part).__name__ for part in parts if part.reads_entropy]
    if not reading:
        return
    ask = composed.all_asks().get("teacher")
    if ask is None:
        raise UserError(
            f"{reading[0]} reads the teacher's entropy, but {type(composed).__name__} has no "
            "teacher; choose a method that has one"
        )
    if not ask.teacher.provides_entropy:
        silent = next(one for one in ask.teacher.parts() if not one.provides_entropy)
        raise UserError(
            f"{reading[0]} reads the teacher's entropy, which {type(silent).__name__} cannot tell; "
            "leave it out, or use a teacher in this process (or its cached answers)"
        )


def _check_asks(composed: ComposedMethod) -> None:
    """Raise UserError unless the method and its terms ask by name, for what they read."""
    asking: list[ComposedMethod | Term] = [composed, *composed.terms]
    for part in asking:
        name, asks = type(part).__name__, part.asks()
        if not isinstance(asks, Mapping) or not all(isinstance(a, Ask) for a in asks.values()):
            raise UserError(
                f"{name}.asks: expected a table of Ask by name, such as "
                "{'teacher': Ask(self.teacher, 'student')}, got " + f"{asks!r:.80}"
            )
    for term in composed.terms:
        if not isinstance(getattr(term, "name", None), str):
            raise UserError(
                f"terms: {type(term).__name__} has no `name`, under which it is logged; set it"
            )


def _check_tokens(composed: ComposedMethod) -> None:
    """Raise UserError unless cross-tokenizer teachers score groups of tokens of plain prompts."""
    method = type(composed).__name__
    summing = [method] if composed.sums_tokens else []
    summing += [type(rule).__name__ for rule in composed.rules if rule.sums_tokens]
    reading = [type(rule).__name__ for rule in composed.rules if rule.reads_probabilities]
    for ask in composed.all_asks().values():
        for part in ask.teacher.parts():
            if not part.has_own_tokenizer:
                continue
            kind = type(part).__name__
            if ask.view != "student":
                raise UserError(
                    f"{method} shows its teacher the view {ask.view!r}, but {kind} reads the plain "
                    "prompt alone; use a teacher with the student's tokenizer"
                )
            if summing:
                raise UserError(
                    f"{summing[0]} adds up log-ratios of single tokens, but {kind} tells those of "
                    "groups, which would count several times; leave it out (OPD: discount 0), or "
                    "use a teacher with the student's tokenizer"
                )
            if reading:
                raise UserError(
                    f"{reading[0]} reads the teacher's probability of every token, but {kind} "
                    "tells those of groups; leave it out, or use a teacher with the student's "
                    "tokenizer"
                )


def corrects_sampler(composed: ComposedMethod) -> bool:
    """Return whether the policy gradient has weights pi_theta / mu, mu the sampling policy."""
    by_rule = any(rule.corrects_sampler for rule in composed.rules)
    return by_rule or composed.surrogate.ratio_to == "sampler"


def _check_known(method: str, teacher: Teacher, function: Any) -> None:
    """Raise UserError if a teacher cannot provide the log-probs that a comparison reads."""
    if provides_distributions(teacher):
        return
    weakest = min(teacher.parts(), key=lambda part: part.provides)
    kind = type(teacher if teacher.provides < weakest.provides else weakest).__name__
    foreign = any(part.has_own_tokenizer for part in teacher.parts())
    if isinstance(function, HybridULD):
        if isinstance(teacher, GroupTeacher):
            return
        raise UserError(
            f"{method} reads whole distributions, which {type(teacher).__name__} "
            + ("of domains with different tokenizers " if foreign else "")
            + "cannot give; use one FrozenTeacher or CrossTokenizerTeacher in this process, or a "
            "method of sampled tokens"
        )
    if foreign:
        raise UserError(
            f"{method} reads whole distributions, which {kind} cannot give token by token; use "
            "GOLD, a method, rules and terms of sampled tokens, or a teacher with the student's "
            "tokenizer"
        )
    if not (provides_top_k(teacher) and isinstance(function, TopK)):
        raise UserError(
            f"{method} reads whole distributions, which {kind} cannot give; use a teacher in this "
            "process with the student's tokenizer, a method of sampled tokens"
            + (", or DivergenceOPD with TopK" if provides_top_k(teacher) else "")
        )
    supports = ("teacher", "intersection", *(("student",) if teacher.scores_given_ids else ()))
    if function.support not in supports:
        raise UserError(
            f"TopK: support is {function.support!r}, of which {kind} cannot tell all log-probs; "
            f"expected {' or '.join(supports)}"
        )


def _check_names(composed: ComposedMethod) -> None:
    """Raise UserError if parts give different meanings to the same name."""
    method = type(composed).__name__
    # Names that the training step uses itself have a meaning that no part can give.
    asks: dict[str, Any] = {STUDENT: None}
    comparisons: dict[str, Any] = {KEPT_MASS: None}
    _add(asks, composed.asks(), method)
    _add(comparisons, composed.comparisons(), method)
    comparisons.setdefault(LOSS, None)  # only a method replaces the policy gradient
    for rule in composed.rules:
        _add(comparisons, rule.comparisons(), f"rules: {type(rule).__name__}")
    for term in composed.terms:
        owner = f"terms: {type(term).__name__}"
        _add(asks, term.asks(), owner)
        _add(comparisons, term.comparisons(), owner)
    names = [term.name for term in composed.terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"terms: two are called {name!r}; give one of them another name")


def _add(known: dict[str, Any], more: Mapping[str, Any], owner: str) -> None:
    for name, meaning in more.items():
        if known.setdefault(name, meaning) != meaning:
            raise UserError(f"{owner}: the name {name!r} is taken; give it another name")
