"""A student as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from opd_lightning.student import Student


def write_hf_folder(student: Student, folder: Path) -> None:
    """Write config, safetensors (LoRA merged) and tokenizer; transformers and vLLM load it."""
    model = student.model
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
