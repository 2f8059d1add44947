"""Scores of a validation compared with those before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning.pytorch import Trainer

from opd_lightning.errors import UserError
from opd_lightning.evaluation.module import EvaluatedModule
from opd_lightning.run.datamodule import RolloutDataModule


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Scores of all suites; larger is better. Suites that are no targets are abilities to keep.

    Example: Measurement(step=5, start={"a": 0.5, "b": 0.9}, scores={"a": 0.7, "b": 0.8},
        targets=["a"]) has gain 0.2 and retention -0.1, with worst ability "b".
    """

    step: int  # optimiser steps made
    start: Mapping[str, float]  # by suite
    scores: Mapping[str, float]  # by suite
    targets: Sequence[str]

    @cached_property
    def deltas(self) -> dict[str, float]:
        return {name: score - self.start[name] for name, score in self.scores.items()}

    @cached_property
    def worst(self) -> str:
        """Name of the ability with the lowest delta."""
        kept = [name for name in self.deltas if name not in self.targets]
        return min(kept, key=self.deltas.__getitem__)

    @property
    def gain(self) -> float:
        """Mean delta of the targets."""
        return sum(self.deltas[name] for name in self.targets) / len(self.targets)

    @property
    def retention(self) -> float:
        """Delta of the worst ability."""
        return self.deltas[self.worst]

    def figures(self) -> dict[str, float]:
        """Return the logged figures, by name."""
        each = {f"retention/delta/{name}": delta for name, delta in self.deltas.items()}
        return {"retention/gain": self.gain, "retention/worst": self.retention, **each}

    def table(self) -> str:
        """Return a Markdown table with one row per suite."""
        rows = ["| suite | | start | now | delta |", "|---|---|---|---|---|"]
        for name, delta in self.deltas.items():
            role = "target" if name in self.targets else "worst" if name == self.worst else ""
            figures = f"{self.start[name]:.3f} | {self.scores[name]:.3f} | {delta:+.3f}"
            rows.append(f"| {name} | {role} | {figures} |")
        return "\n".join(rows)


def check_measurable(targets: list[str], data: RolloutDataModule, trainer: Trainer) -> None:
    """Raise UserError unless targets and other suites are all measured in full."""
    suites = data.suites_of("validate")
    unknown = [name for name in targets if name not in suites]
    if unknown or not targets or not suites.keys() - set(targets):
        raise UserError(
            f"CapabilityRetention.targets: got {targets} of the suites {list(suites)} in "
            "data.validation and data.texts, expected at least one of them, and another to be kept"
        )
    for name, suite in suites.items():
        if suite.judged_by(data.verifier) is None:
            raise UserError(
                f"CapabilityRetention: suite {name!r} has no verifier, so nothing to compare; set "
                "its verifier or data.verifier"
            )
    limit = trainer.limit_val_batches
    # The whole number 1 is one batch.
    if not trainer.enable_validation or isinstance(limit, int) or limit != 1.0:
        raise UserError(
            "CapabilityRetention: trainer.limit_val_batches is "
            f"{limit}, expected 1.0, so that suites are measured whole"
        )


def measured_scores(module: EvaluatedModule, data: RolloutDataModule) -> dict[str, float]:
    """Return the score `judged_by` of each measured suite, by name."""
    scores = {}
    for name, suite in module.suites.items():
        figure, found = suite.judged_by(data.verifier), module.suite_scores[name].compute()
        if figure is None:
            continue
        if figure not in found:
            raise UserError(
                f"suite {name!r}: {type(suite).__name__}.judged_by returned {figure!r}, expected "
                f"one of its figures ({', '.join(found)}); correct it, or return None"
            )
        scores[name] = float(found[figure])
    return scores
