"""Checkpoints on the Pareto front of gain and retention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from opd_lightning.checkpoints.staging import remove
from opd_lightning.errors import UserError, note
from opd_lightning.models.strict_json import dumps
from opd_lightning.run.lock import FOLDER_SETTINGS

from .measurement import Measurement

INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """Gain and retention of a run at a step, relative to its start."""

    step: int  # optimiser steps made
    gain: float  # mean delta of the targets
    retention: float  # delta of the worst ability
    scores: dict[str, float]  # score of every suite

    @classmethod
    def of(cls, found: Measurement) -> Point:
        scores = dict(found.scores)
        return cls(step=found.step, gain=found.gain, retention=found.retention, scores=scores)

    def beats(self, other: Point) -> bool:
        """Return whether gain and retention are both at least those of `other`."""
        return self.gain >= other.gain and self.retention >= other.retention


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats, in their order; of equal points the first."""
    kept: list[Point] = []
    for point in points:
        if not any(other.beats(point) for other in kept):
            kept = [other for other in kept if not point.beats(other)] + [point]
    return kept


class ParetoFolder:
    """Folder with the students of a Pareto front (weights only) and their index, `index.json`.

    The start may be a point of the front. It has no file: its weights are the student's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file_of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.ckpt"

    def begin(self, *, again: bool) -> None:
        """Delete the students of an earlier process, which ended before its first checkpoint.

        Args:
            again: Whether that process was of this run.

        Raises:
            UserError: The folder has students of another run.
        """
        found = sorted(self.folder.glob("step-*.ckpt"))
        if found and not again:
            raise UserError(
                f"{str(self.folder)!r} holds the students of an earlier run; name another run "
                f"folder with {FOLDER_SETTINGS}, or remove them"
            )
        for file in found:
            remove(file)
        if found:
            note(f"{str(self.folder)!r}: removed {len(found)} students from before the restart")

    def present(self, points: list[Point]) -> list[Point]:
        """Return the points without those whose students are gone, and note these.

        Going back to an earlier checkpoint loses students: later ones had replaced them.
        """
        gone = [point for point in points if point.step and not self.file_of(point.step).exists()]
        if gone:
            steps = ", ".join(str(point.step) for point in gone)
            note(f"{str(self.folder)!r}: the students of steps {steps} are gone: no longer counted")
        return [point for point in points if point not in gone]

    def keep(self, trainer: Trainer, points: list[Point], about: dict[str, Any]) -> None:
        """Save the student if it is the newest point, and delete files of former points.

        Collective. Files of later steps, left by a killed run, stay until this run reaches their
        steps.

        Args:
            trainer: Trainer of the student.
            points: Pareto front.
            about: Further entries of the index.
        """
        now = trainer.global_step
        if now and points[-1].step == now:
            trainer.save_checkpoint(self.file_of(now), weights_only=True)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [
            asdict(point) | {"checkpoint": self.file_of(point.step).name if point.step else None}
            for point in points
        ]
        new = self.folder / f".{INDEX}"
        new.write_text(dumps({**about, "points": rows}, indent=2) + "\n", encoding="utf-8")
        new.replace(self.folder / INDEX)
        steps = {point.step for point in points}
        for file in self.folder.glob("step-*.ckpt"):
            step = int(file.stem.removeprefix("step-"))
            if step <= now and step not in steps:
                remove(file)
