"""A run with all that a checkpoint must hold, and where it is."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "lab" / "g_opd.yaml"
RUN = Path("run")  # in the folder that a run works in


def settings(
    folder: Path,
    *,
    steps: int,
    every: int = 2,
    keep: int = 2,
    callbacks: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """A config over `CONFIG`, or another of two teachers, with all that a checkpoint must hold.

    Args:
        folder: Where the run will work, and the config goes.
        steps: Of the run; eight are an epoch.
        every: Steps from one checkpoint to the next.
        keep: How many of them, those of least loss; -1 for all.
        callbacks: Class paths of further ones.
        changes: Values by section and name, such as `data__engine`.
    """
    lightning = "lightning.pytorch.callbacks."
    saver, length = f"{lightning}ModelCheckpoint", "val/sums/length"
    often = {"every_n_train_steps": every, "save_top_k": keep, "monitor": "loss"}
    best = {"filename": "best-{step}", "monitor": length, "mode": "max"}
    everything: list[tuple[str, dict[str, Any]]] = [
        (saver, often | {"save_last": True}),
        (saver, best),
        (f"{lightning}EarlyStopping", {"monitor": length, "patience": 1000}),
        (f"{lightning}LearningRateMonitor", {}),
        ("callbacks.EMATeacherUpdate", {}),
        ("callbacks.RolloutLog", {"every_n_steps": 3}),
        ("callbacks.SignalPlots", {"every_n_steps": 3}),
        (f"{__name__}.Whereabouts", {"path": "whereabouts"}),
        *((name, {}) for name in callbacks),
    ]
    reference = {"class_path": "opd_lightning.teachers.EMATeacher", "init_args": {"rate": 0.1}}
    overlay: dict[str, Any] = {
        "model": {
            "init_args": {
                "reference": reference,
                "lr_scheduler": {"init_args": {"total_steps": steps, "pct_start": 0.4}},
                "rules": [{"class_path": "opd_lightning.rules.TruncatedImportance"}],
            }
        },
        "data": {
            "prompts_per_step": 4,
            "samples_per_prompt": 1,
            "sampling": {"max_new_tokens": 12},
            "train": {"limit": 32},
            "validation": {"sums": {"prompts": {"limit": 16}, "batch_size": 8}},
        },
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "val_check_interval": 2 * 5,  # micro-batches: every fifth step
            "enable_progress_bar": False,
            "logger": {"init_args": {"save_dir": str(RUN)}},
            "callbacks": [{"class_path": path, "init_args": args} for path, args in everything],
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        overlay[section][name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(json.dumps(overlay))
    return path


def fit_command(*configs: Path, more: tuple[str, ...] = ()) -> list[str]:
    """The one command that starts and restarts a run."""
    named = [word for path in configs for word in ("--config", str(path))]
    return [
        sys.executable, "-m", "opd_lightning", "fit", *named, *more, "--ckpt_path", "last",
    ]  # fmt: skip


class Place(NamedTuple):
    """Where a run is: a phase, and optimiser steps made."""

    phase: str
    step: int


class Whereabouts(Callback):
    """Tells who kills where a run is, in a file that outlives it.

    "saving" lasts from the checkpoint's first byte in memory to the next step or validation.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _at(self, phase: str, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            line = f"{phase} {trainer.global_step}".ljust(40)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT)
            os.write(handle, line.encode())
            os.close(handle)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            Path(f"{self.path}.resumed").write_text(str(trainer.global_step))
        self._at("step", trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("step", trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._at("step", trainer)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._at("saving", trainer)


class Snapshot(Callback):
    """Copies the run's folder to `../killed` as a SIGKILL between two savers would leave it.

    The first has saved the step of a validation, and the second is about to save the best score.
    """

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        if trainer.saving.endswith("best-step=5.ckpt") and not Path("../killed").exists():
            copytree(".", "../killed", symlinks=True)


def place(folder: Path) -> Place:
    """Where the run in `folder` was when it last told."""
    with suppress(FileNotFoundError, ValueError):
        phase, step = (folder / "whereabouts").read_text().split()
        return Place(phase, int(step))
    return Place("start-up", -1)


def resumed_at(folder: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int((folder / "whereabouts.resumed").read_text())
    return None
