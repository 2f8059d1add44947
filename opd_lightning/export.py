"""From a checkpoint to an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from opd_lightning.errors import UserError
from opd_lightning.student import Student

PREFIX = "student."  # of its tensors in a checkpoint


def load_student(student: Student, checkpoint: str) -> int:
    """Load the student's weights from a run's checkpoint; returns the optimiser step.

    A checkpoint is a file, or a folder of shards, which are read straight into the weights.
    """
    if Path(checkpoint).is_dir():
        return _load_shards(student, Path(checkpoint))
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint!r} is no checkpoint: {reason}; name one of a run's"
        ) from error
    saved = content.get("state_dict", {}) if isinstance(content, dict) else {}
    weights = {n.removeprefix(PREFIX): t for n, t in saved.items() if n.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{checkpoint!r} holds no student; give a checkpoint that `opd fit` wrote")
    student.load()
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise _not_its_student(student, checkpoint, error) from error
    return int(content["global_step"])


def _load_shards(student: Student, folder: Path) -> int:
    rest = folder / "meta.pt"  # all but weights and optimiser
    if not rest.is_file():
        raise UserError(f"{str(folder)!r} is no checkpoint: it has no meta.pt; name one of a run's")
    student.load()
    weights = {f"{PREFIX}{name}": tensor for name, tensor in student.state_dict().items()}
    try:
        dcp.load({"state_dict": weights}, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise _not_its_student(student, str(folder), error) from error
    return int(torch.load(rest, map_location="cpu", weights_only=True)["global_step"])


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
    lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
