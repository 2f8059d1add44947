"""Generation settings that transformers saves: it checks them more strictly than on loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_lightning.errors import note


def valid_settings(given: Any) -> Any:
    """Return a GenerationConfig with the settings of `given` that transformers saves.

    Settings of sampling mean `do_sample: true` if `do_sample` is not set. Other settings without
    effect, such as those of beam search without beams, are left out. Every change is reported.
    """
    settings = {
        name: value
        for name, value in vars(given).items()
        if value is not None and not name.startswith("_")
    }
    kind = type(given)
    config, refused = _valid_part(kind, settings)
    if refused and "do_sample" not in settings:
        sampled, still_refused = _valid_part(kind, {"do_sample": True, **settings})
        if len(still_refused) < len(refused):
            saved = ", ".join(name for name in refused if name not in still_refused)
            note(f"generation_config.json: written with do_sample: true, for the sake of {saved}")
            config, refused = sampled, still_refused
    if refused:
        left = ", ".join(f"{name}: {value}" for name, value in refused.items())
        note(f"generation_config.json: written without {left}, which transformers does not save")
    return config


def _valid_part(kind: type[Any], settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a configuration of the settings that are valid together, and the others.

    A setting may be valid only with another one, so those refused are tried until none is added.
    """
    config, left = kind(), dict(settings)
    while True:
        refused = {name: value for name, value in left.items() if not _add(config, name, value)}
        if len(refused) == len(left):
            return config, refused
        left = refused


def _add(config: Any, name: str, value: Any) -> bool:
    """Add a setting if it is valid with those that are there; return whether it is."""
    before = dict(vars(config))
    setattr(config, name, value)
    try:
        config.validate(strict=True)
    except ValueError:
        vars(config).clear()
        vars(config).update(before)
        return False
    return True
