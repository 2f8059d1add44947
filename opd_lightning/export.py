"""From a checkpoint to an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.plain import load
from opd_lightning.checkpoints.writing import META
from opd_lightning.errors import UserError
from opd_lightning.library_bars import told_as
from opd_lightning.student import Student

PREFIX = "student."  # of its tensors in a checkpoint


def load_student(student: Student, checkpoint: str) -> int:
    """Load the student's weights from a run's checkpoint; returns the optimiser step.

    A checkpoint is a file, or a folder of shards, which are read straight into the weights.
    """
    if whole(checkpoint).is_folder:
        return _load_shards(student, Path(checkpoint))
    content = load(Path(checkpoint), mmap=True)
    saved = content["state_dict"].items()
    weights = {n.removeprefix(PREFIX): t for n, t in saved if n.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{checkpoint!r} holds no student; give a checkpoint that `opd fit` wrote")
    student.load()
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise _not_its_student(student, checkpoint, error) from error
    return int(content["global_step"])


def _load_shards(student: Student, folder: Path) -> int:
    student.load()
    weights = {f"{PREFIX}{name}": tensor for name, tensor in student.state_dict().items()}
    try:
        dcp.load({"state_dict": weights}, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise _not_its_student(student, str(folder), error) from error
    return int(load(folder / META)["global_step"])


def _not_its_student(student: Student, checkpoint: str, error: BaseException) -> UserError:
    difference = " ".join(str(error).split())[:300]
    return UserError(
        f"{checkpoint!r} is not of the student in this config ({student.source.path!r}): "
        f"{difference}"
    )


def write_hf_folder(student: Student, folder: Path) -> None:
    """Write config, safetensors (LoRA merged) and tokenizer; transformers and vLLM load it."""
    model = student.model
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    with told_as("write student", "shard"):
        lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
