"""`opd export`: a checkpoint's student as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from huggingface_hub.errors import StrictDataclassError

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.matching import first_difference, shapes_of
from opd_lightning.checkpoints.plain import load
from opd_lightning.checkpoints.reading import Saved
from opd_lightning.errors import UserError
from opd_lightning.models.generation_settings import valid_settings
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.terminal.library_bars import shown_as

PREFIX = "student."  # prefix of the student's tensors in a checkpoint
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


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
    """Write config, safetensors (LoRA merged) and tokenizer, as transformers and vLLM load them.

    Both configuration files get the ids that ended the student's responses. A model that also reads
    images keeps the files of its processor, without which vLLM does not load it.
    """
    model = student.model
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _set_ends(lm, student.source)
    with shown_as("write student", "shard"):
        lm.save_pretrained(folder, state_dict=dict(student.weights()))
    student.source.tokenizer.save_pretrained(folder)
    if lm.config.get_text_config() is not lm.config:
        _copy_processor(student.source, folder)


def _copy_processor(source: ModelSource, folder: Path) -> None:
    """Copy the files of a model's processor that are there."""
    from transformers.utils import cached_file

    for name in PROCESSOR:
        file = cached_file(
            source.path,
            name,
            local_files_only=source.local_files_only,
            _raise_exceptions_for_missing_entries=False,
        )
        if file is not None:
            shutil.copyfile(file, folder / name)


def _set_ends(lm: Any, source: ModelSource) -> None:
    """Set `eos_token_id` of the model's configurations, with the tokenizer's EOS first.

    Generation settings that transformers refuses to save are repaired.
    """
    own = source.tokenizer.eos_token_id
    ids = sorted(source.eos_ids, key=lambda i: i != own)
    ends = ids[0] if len(ids) == 1 else ids
    if lm.can_generate():
        lm.generation_config = valid_settings(lm.generation_config)
        lm.generation_config.eos_token_id = ends
    text = lm.config.get_text_config()
    for config in [text] if text is lm.config else [text, lm.config]:
        try:
            config.eos_token_id = ends
        except StrictDataclassError:  # a few architectures take one id alone
            config.eos_token_id = ids[0]
