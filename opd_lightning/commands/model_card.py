"""Model card of an exported student, in the Markdown that the Hugging Face hub shows."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from opd_lightning import __version__
from opd_lightning.checkpoints.reading import Saved
from opd_lightning.training.base import DistillationModule

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
VALIDATION = "val/"


def model_card(
    module: DistillationModule, name: str, saved: Saved, state: Mapping[str, Any]
) -> str:
    """Return the card of a checkpoint's student.

    Settings and figures are those that the checkpoint keeps; of one that keeps none, the card has
    no such section. Folders are named by their last part.

    Args:
        module: The method, with student and teachers; nothing needs to be loaded.
        name: Name of the exported model.
        saved: Description of the checkpoint.
        state: Plain data of the checkpoint.
    """
    log = state.get("log", {})
    settings, figures = log.get("settings", {}), log.get("monitored", {})
    method = str(saved.written_by.get("method") or settings.get("method") or type(module).__name__)
    start = module.student.source.path
    parts = [
        f"---\n{yaml.safe_dump(_front(start, method), sort_keys=False)}---",
        f"# {name}",
        f"{_shown(start)} after {saved.step:,} optimiser steps of {method} with OPD Lightning"
        f" {__version__}, a program for on-policy distillation.",
    ]
    if method == type(module).__name__:
        parts.append(_first_sentence(module))
    parts += ["## Models", _table(("role", "model"), _models(module))]
    if scores := _scores(figures):
        parts += [
            "## Scores",
            "The newest validation when the checkpoint was saved.",
            _table(("suite", "figure", "value"), scores),
        ]
    last = [(key, f"{figures[key]:.4g}") for key in sorted(figures) if "/" not in key]
    if last:
        parts += ["## Last step", _table(("figure", "value"), last)]
    if settings:
        rows = [(key, _shown(value)) for key, value in settings.items()]
        parts += ["## Settings", _table(("setting", "value"), rows)]
    parts += [
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
        "The licenses of the models above apply; none is stated here.",
    ]
    return "\n\n".join(parts) + "\n"


def _front(start: str, method: str) -> dict[str, Any]:
    """Return the card's metadata; a base model only if it is on the hub."""
    on_hub = HUB_NAME.fullmatch(start) is not None and not Path(start).exists()
    return {
        **({"base_model": start} if on_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "opd-lightning", method.lower()],
    }


def _models(module: DistillationModule) -> list[tuple[str, str]]:
    rows = [("student before training", _shown(module.student.source.path))]
    for role, ask in module.all_asks().items():
        view = "" if ask.view == "student" else f", under the prompt {ask.view!r}"
        for part in ask.teacher.parts():
            source = "" if part.source is None else f" {_shown(part.source.path)}"
            rows.append((role, f"{type(part).__name__}{source}{view}"))
    return rows


def _scores(figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return suite, figure and value of all validation figures that are numbers."""
    found = []
    for key, value in sorted(figures.items()):
        if key.startswith(VALIDATION) and not math.isnan(value):
            suite, _, figure = key.removeprefix(VALIDATION).partition("/")
            found.append((suite, figure, f"{value:.4g}"))
    return found


def _first_sentence(module: DistillationModule) -> str:
    paragraph = (inspect.getdoc(type(module)) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _shown(value: object) -> str:
    """Return a setting; of a folder of this machine, its last part."""
    text = str(value)
    return PurePath(text).name if text.startswith(("/", "~", ".")) and len(text) > 1 else text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
