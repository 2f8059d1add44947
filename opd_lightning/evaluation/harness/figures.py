"""Figures of lm-eval's results under the names that are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from opd_lightning.errors import UserError
from opd_lightning.evaluation.statistics import wilson

WIDTH = 1.96  # half a 95 % interval in standard errors
SHARES = ("acc", "exact_match")  # prefixes of metrics that are shares of the documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures of a task, or of a group and its members.

    A metric of a task with several answer filters is named `metric.filter`.
    """

    values: Mapping[str, float]  # by metric
    errors: Mapping[str, float]  # standard errors, where they are known
    higher_is_better: Mapping[str, bool]
    members: Mapping[str, Mapping[str, float]]  # values of a group's members, by their name
    documents: int

    @classmethod
    def of(cls, results: Mapping[str, Any], name: str) -> Self:
        """Convert the return value of lm-eval's `evaluate`."""
        found = results["results"]
        own = {k: v for k, v in found[name].items() if "," in k and isinstance(v, int | float)}
        directions = results["higher_is_better"].get(name, {})
        values, errors = {}, {}
        higher: dict[str, bool] = {}
        for key, value in own.items():
            metric, _, _ = key.partition(",")
            if metric.endswith("_stderr"):
                errors[_plain(key).replace("_stderr", "", 1)] = float(value)
            else:
                values[_plain(key)] = float(value)
                higher[_plain(key)] = directions.get(metric) is not False
        return cls(
            values=values,
            errors=errors,
            higher_is_better=higher,
            members={
                member: {_plain(k): v for k, v in found[member].items() if "," in k}
                for member in results["group_subtasks"].get(name, [])
            },
            documents=found[name].get("sample_len", 0),
        )

    def choose(self, metric: str | None) -> str:
        """Return the main metric: the one given, else `acc_norm`, else the first."""
        if not self.values:
            raise UserError("it has no figure of its own; name one of its members")
        if metric is None:
            return "acc_norm" if "acc_norm" in self.values else next(iter(self.values))
        if metric not in self.values:
            raise UserError(f"metric: got {metric!r}, expected one of {', '.join(self.values)}")
        return metric

    def judged_by(self, metric: str) -> dict[str, float]:
        """Return all metrics, standard errors, and the score by `metric` with its 95 % interval."""
        found = {**self.values, **{f"{k}_stderr": v for k, v in self.errors.items()}}
        value = self.values[metric]
        score = found["score"] = self._score(metric, value)
        if metric in self.errors:
            found["score_low"], found["score_high"] = self._interval(metric, value, score)
        for name, values in self.members.items():
            if metric in values:
                found[f"score/{name}"] = self._score(metric, values[metric])
        return found

    def _interval(self, metric: str, value: float, score: float) -> tuple[float, float]:
        """Return the 95 % interval; of a share Wilson's, for the n that has its standard error."""
        error = self.errors[metric]
        n = value * (1 - value) / error**2 if error else self.documents
        if metric.startswith(SHARES) and 0 <= value <= 1 and n:
            low, high = wilson(torch.tensor(value, dtype=torch.float64), n)
            return float(low), float(high)
        reach = WIDTH * error / (value if self._is_perplexity(metric) else 1)
        return score - reach, score + reach

    def _score(self, metric: str, value: float) -> float:
        """Return a value where higher is better; for a perplexity, the log-likelihood."""
        if self._is_perplexity(metric):
            return -math.log(value)
        return value if self.higher_is_better[metric] else -value

    def _is_perplexity(self, metric: str) -> bool:
        return "perplexity" in metric and not self.higher_is_better[metric]


def _plain(key: str) -> str:
    metric, _, kind = key.partition(",")
    return metric if kind == "none" else f"{metric}.{kind}"
