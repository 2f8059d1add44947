"""The student's initial weights as a teacher.

Both kinds read full distributions, compute as the student does, and need no state in a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd_lightning.errors import UserError
from opd_lightning.models.lora import moves_base, starts_elsewhere
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.of_student import AdapterOffTeacher

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


def check_start(student: Student) -> None:
    """Raise UserError if the student's initial weights could not be had again."""
    if student.lora is not None and starts_elsewhere(student.lora):
        raise UserError(
            f"student.lora.init_lora_weights: got {student.lora.init_lora_weights!r}, with which "
            "the student does not start as the model in its folder, but a suite compares with its "
            "start; use true, or leave the comparison out"
        )


def reads_folder(student: Student) -> bool:
    """Return whether the start is a second model, read from the student's folder."""
    return student.lora is None or moves_base(student.lora) is not None


def start_of(student: Student, compute_dtype: torch.dtype | None) -> LocalTeacher:
    """Return a teacher with the student's initial weights, not loaded yet.

    Stored log-probs would be cheaper. But of a vocabulary of 150,000 only those of the top tokens
    fit on disk, and the mass that training moves is often on the others.

    Args:
        student: The student.
        compute_dtype: Autocast dtype of its layers; None is that of the weights.
    """
    check_start(student)
    if reads_folder(student):
        return _ReadStart(student, compute_dtype)
    return _BareStart(compute_dtype)


class _BareStart(AdapterOffTeacher):
    """The base model beneath the student's adapter."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, compute_dtype: torch.dtype | None) -> None:
        self.compute_dtype = compute_dtype


class _ReadStart(FrozenTeacher):
    """The student's folder, loaded again; in CPU memory while not in use."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, student: Student, compute_dtype: torch.dtype | None) -> None:
        super().__init__(
            student.source.path,
            dtype=student.dtype,
            attn_implementation=student.attn_implementation,
            trust_remote_code=student.source.trust_remote_code,
            offload=True,
        )
        self.compute_dtype = compute_dtype
