"""`opd export`: a checkpoint's student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.matching import first_difference, shapes_of
from opd_lightning.checkpoints.plain import load
from opd_lightning.checkpoints.reading import Saved
from opd_lightning.errors import UserError
from opd_lightning.models.student import Student
from opd_lightning.terminal.library_bars import shown_as

PREFIX = "student."  # prefix of the student's tensors in a checkpoint


def load_student(student: Student, checkpoint: str) -> Saved:
    """Load the student's weights from a run's checkpoint and return its description.

    A checkpoint is a file or a folder of shards. Shards are read directly into the weights.

    Raises:
        UserError: The checkpoint is damaged, or of another student.
    """
    saved = whole(checkpoint)
    there = {n.removeprefix(PREFIX): s for n, s in saved.shapes.items() if n.startswith(PREFIX)}
    if not there:
        raise UserError(f"{checkpoint!r} holds no student; give a checkpoint that `opd fit` wrote")
    student.load()
    if difference := first_difference(there, shapes_of(student)):
        raise UserError(
            f"{checkpoint!r} is not of the student in this config ({student.source.path!r}): "
            f"{difference}; give the config.yaml of the run that wrote it"
        )
    weights = student.state_dict()
    if saved.is_folder:
        content: dict[str, Any] = {"state_dict": {PREFIX + n: t for n, t in weights.items()}}
        dcp.load(content, checkpoint_id=saved.path, no_dist=True)
    else:
        content = load(saved.path, mmap=True)
        student.load_state_dict({n: content["state_dict"][PREFIX + n] for n in weights})
    return saved


def write_hf_folder(student: Student, folder: Path) -> None:
    """Write config, safetensors (LoRA merged) and tokenizer, as transformers and vLLM load them."""
    model = student.model
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    with shown_as("write student", "shard"):
        lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
