"""What is looked at before a run: by `opd fit` before weights load, by `opd check` in numbers."""

from opd_lightning.preflight.configuration import (
    check_method,
    check_models,
    check_same_tokens,
    check_step_size,
    check_trainer,
    check_usable,
    teacher_sources,
)
from opd_lightning.preflight.prompts import check_prompts

__all__ = [
    "check_method",
    "check_models",
    "check_prompts",
    "check_same_tokens",
    "check_step_size",
    "check_trainer",
    "check_usable",
    "teacher_sources",
]
