"""State of Lightning's ModelCheckpoint that its own checkpoint state does not include."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints.newest import model_checkpoints

_UNSAVED = (
    "current_score",
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
)

_PATHS = (
    "best_model_path",
    "kth_best_model_path",
    "last_model_path",
    "_last_checkpoint_saved",
)


def drop_foreign_paths(saver: ModelCheckpoint) -> list[str]:
    """Drop from a restored ModelCheckpoint all paths outside its own folder, and return them.

    A checkpoint names the files that its ModelCheckpoint will remove. Lightning compares such paths
    without resolving `..` and links, so that a foreign checkpoint could remove any folder.
    """
    folder = Path(saver.dirpath or ".").resolve()
    named = [*saver.best_k_models, *(str(getattr(saver, name) or "") for name in _PATHS)]
    foreign = [p for p in dict.fromkeys(named) if p and not _is_below(Path(p), folder)]
    if not foreign:
        return []
    if {saver.kth_best_model_path, *saver.best_k_models} & set(foreign):
        saver.best_k_models, saver.kth_best_model_path = {}, ""
    for name in _PATHS:
        if getattr(saver, name) in foreign:
            setattr(saver, name, "")
    return foreign


def missing_models(saver: ModelCheckpoint) -> list[str]:
    """Return the files that a restored ModelCheckpoint counts among the best, but are gone."""
    return [path for path in saver.best_k_models if not os.path.lexists(path)]


def drop_models(saver: ModelCheckpoint, paths: Collection[str]) -> None:
    """Drop files from those that a ModelCheckpoint counts among the best.

    A score whose file is gone would keep later files with lower ones from being saved.
    """
    scores = {p: score for p, score in saver.best_k_models.items() if p not in paths}
    saver.best_k_models = scores
    if saver.kth_best_model_path in paths:  # computed again when there are enough
        saver.kth_best_model_path = ""
    if saver.best_model_path in paths:
        first = min if saver.mode == "min" else max
        saver.best_model_path = first(scores, key=scores.__getitem__, default="")
        saver.best_model_score = scores.get(saver.best_model_path)


def _is_below(path: Path, folder: Path) -> bool:
    try:
        return folder in path.resolve().parents
    except (OSError, RuntimeError):  # a circle of links
        return False


class RememberSavers(Callback):
    """Callback that saves and restores the state that ModelCheckpoint omits.

    Otherwise a resumed run saves its first step again as `-v1` and counts it twice among the best.
    If a run was killed between two ModelCheckpoints of one validation, the remaining ones save on
    resumption. A save deferred to the next validation (on a training metric, in the last step of
    an epoch) happens at the end of training if no validation follows.
    """

    def __init__(self) -> None:
        self._resumed = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saving = getattr(trainer, "saving", None)
        checkpoint["savers"] = {}
        for saver in model_checkpoints(trainer):
            state = {name: getattr(saver, name) for name in _UNSAVED}
            written = {*saver.best_k_models, saver.best_model_path, saver.last_model_path}
            if saving in written:  # recorded by the saver only once it is written
                state["_last_global_step_saved"] = trainer.global_step
            checkpoint["savers"][saver.state_key] = state

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = True
        for saver in model_checkpoints(trainer):
            for name, value in checkpoint.get("savers", {}).get(saver.state_key, {}).items():
                if name in _UNSAVED:
                    setattr(saver, name, value)
            if saver._every_n_train_steps:  # earlier versions did not record the step
                saver._last_global_step_saved = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._resumed and pl_module.validation_is_over:
            for saver in model_checkpoints(trainer):  # a saver that has saved this step skips it
                saver.on_validation_end(trainer, pl_module)
        self._resumed = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for saver in model_checkpoints(trainer):
            if saver._defer_save_until_validation and saver.monitor in trainer.callback_metrics:
                saver.on_validation_end(trainer, pl_module)
