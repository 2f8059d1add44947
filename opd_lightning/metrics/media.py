"""Texts, tables and pictures in whatever loggers a run has; figures are in `metrics/log.py`.

TensorBoard, Weights & Biases and MLflow receive them. In a run that has none of these, they become
files of the run folder: `tables/<tag>/<step>.md` and `pictures/<tag>/<step>.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

TRACKERS = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def run_folder_of(trainer: Trainer) -> Path | None:
    """Return the run folder during `fit`; None if the run keeps no files."""
    folder: Path | None = getattr(trainer, "run_folder", None)  # attribute of the Trainer of `opd`
    return folder


def write_text(trainer: Trainer, tag: str, text: str, step: int) -> None:
    """Log a Markdown text at a step. Called on the process that writes."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["text"], data=[[text]], step=step)
        else:
            _write_markdown(logger, tag, text, step)
    _write_file(trainer, Path("tables", tag, f"{step:06d}.md"), text.encode())


def write_table(
    trainer: Trainer,
    tag: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    step: int,
    max_characters: int,
) -> None:
    """Log a table of texts at a step. Called on the process that writes.

    Args:
        trainer: Its loggers receive the table.
        tag: Name of the table.
        columns: Names of the columns.
        rows: Cells, one sequence a row.
        step: Optimiser step.
        max_characters: Longer cells are cut in the middle, except in Weights & Biases.
    """
    markdown = _as_markdown(columns, rows, max_characters)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(
                tag, columns=list(columns), data=[list(row) for row in rows], step=step
            )
        else:
            _write_markdown(logger, tag, markdown, step)
    _write_file(trainer, Path("tables", tag, f"{step:06d}.md"), markdown.encode())


def write_picture(trainer: Trainer, tag: str, picture: np.ndarray, step: int) -> None:
    """Log a picture `[H, W, 3]` uint8 at a step. Called on the process that writes."""
    name = Path(tag, f"{step:06d}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [picture], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture, str(name))
    if _needs_file(trainer):
        _write_file(trainer, "pictures" / name, _as_png(picture))


def _write_markdown(logger: Logger, tag: str, text: str, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, text, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, f"{tag}/{step:06d}.md")


def _needs_file(trainer: Trainer) -> bool:
    """Return whether the run has a folder, and no logger that takes more than figures."""
    tracked = any(isinstance(logger, TRACKERS) for logger in trainer.loggers)
    return run_folder_of(trainer) is not None and not tracked


def _write_file(trainer: Trainer, name: Path, content: bytes) -> None:
    folder = run_folder_of(trainer)
    if folder is not None and _needs_file(trainer):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _as_png(picture: np.ndarray) -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def _as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], max_characters: int) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(x, max_characters) for x in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str, max_characters: int) -> str:
    if len(text) > max_characters:
        half = max_characters // 2
        text = f"{text[:half]} ... {text[-half:]}"
    # In Markdown, a bar ends the cell and a line break the row.
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
