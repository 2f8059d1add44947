"""States of rules in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.errors import UserError, cut
from opd_lightning.rules.base import Rule

log = logging.getLogger(__name__)


def states_of(rules: Sequence[Rule]) -> dict[str, Any]:
    """Return the states of rules that have one, by place and class."""
    return {key: state for key, rule in _named(rules) if (state := rule.state_dict())}


def restore_states(rules: Sequence[Rule], states: Mapping[str, Any]) -> None:
    """Restore the states of a checkpoint. Warns of rules whose state it lacks.

    Raises:
        UserError: A rule cannot restore its state.
    """
    for key, rule in _named(rules):
        if key in states:
            try:
                rule.load_state_dict(states[key])
            except Exception as error:
                name = type(rule).__name__
                raise UserError(
                    f"{name}.load_state_dict: got the state of the checkpoint, expected one that "
                    f"it can restore; {cut(f'{type(error).__name__}: {error}', 120)}: let it read "
                    f"what {name}.state_dict returned when the checkpoint was saved"
                ) from error
        elif rule.state_dict():
            log.warning("rules: the checkpoint has no state of rule %s, which begins anew", key)


def _named(rules: Sequence[Rule]) -> list[tuple[str, Rule]]:
    return [(f"{place} {type(rule).__name__}", rule) for place, rule in enumerate(rules)]
