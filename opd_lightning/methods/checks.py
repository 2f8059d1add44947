"""Whether the parts of a composed method fit one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.methods.scoring import LOSS
from opd_lightning.rules.importance import IcePop, TruncatedImportance
from opd_lightning.teachers.base import DistributionTeacher

if TYPE_CHECKING:
    from opd_lightning.methods.composed import ComposedMethod


def check_parts(composed: ComposedMethod) -> None:
    """Raise UserError, before any weight is loaded, where a part reads what nobody gives."""
    method, asks = type(composed).__name__, composed.all_asks()
    for rule in composed.rules:
        name = type(rule).__name__
        for need in rule.needs:
            if need not in asks:
                raise UserError(
                    f"rules: {name} reads the scores called {need!r}, but {method} asks for "
                    f"{', '.join(asks) or 'none'}; choose a method that has them"
                )
        if rule.shapes_advantage and LOSS in composed.comparisons():
            raise UserError(
                f"rules: {name} changes the advantage, but {method}'s loss is a divergence, "
                "which has none; use a rule that weighs or masks, or a sampled method"
            )
    names = [term.name for term in composed.terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"terms: two are called {name!r}; give one of them another name")
    corrected = any(isinstance(rule, TruncatedImportance | IcePop) for rule in composed.rules)
    if composed.surrogate.ratio_to == "sampler" and corrected:
        raise UserError(
            f"surrogate.ratio_to: got 'sampler', which corrects for the engine in full, but "
            f"{method} has a rule that does so too; set importance_cap to null, or ratio_to to "
            "'trainer'"
        )
    for name, wish in composed.all_comparisons().items():
        if wish.other is not None and wish.other not in asks:
            raise UserError(f"{name} compares with {wish.other!r}, which {method} does not ask")
    for teacher in composed.compared_teachers():
        if not isinstance(teacher, DistributionTeacher):
            raise UserError(
                f"{method} reads whole distributions, which {type(teacher).__name__} cannot "
                "give; use a teacher in this process, or a method of sampled tokens"
            )
