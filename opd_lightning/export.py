"""From a checkpoint to an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from opd_lightning.errors import UserError
from opd_lightning.student import Student

PREFIX = "student."  # of its tensors in a checkpoint


def load_student(student: Student, checkpoint: str) -> int:
    """Load the student's weights from a run's checkpoint; returns the optimiser step."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    saved = content.get("state_dict", {}) if isinstance(content, dict) else {}
    weights = {n.removeprefix(PREFIX): t for n, t in saved.items() if n.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{checkpoint!r} holds no student; give a checkpoint that `opd fit` wrote")
    student.load()
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:300]
        raise UserError(
            f"{checkpoint!r} is not of the student in this config ({student.source.path!r}): "
            f"{difference}"
        ) from error
    return int(content["global_step"])


def write_hf_folder(student: Student, folder: Path) -> None:
    """Write config, safetensors (LoRA merged) and tokenizer; transformers and vLLM load it."""
    model = student.model
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
