"""The student as it was before its first step, asked as a teacher.

Both kinds know the whole vocabulary, compute as the student does, and need nothing in a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.local import LocalTeacher
from opd_lightning.teachers.of_student import AdapterOffTeacher

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


def start_of(student: Student, compute_dtype: torch.dtype | None) -> LocalTeacher:
    """The student's start, to be loaded.

    Its log-probs on disk would be cheaper to ask. But of a vocabulary of 150,000 only the likeliest
    tokens' fit there, and the mass that a student moves is often among the others.

    Args:
        student: Whose start.
        compute_dtype: Of its layers' arithmetic under autocast; None is that of the weights.
    """
    if student.lora is not None:
        return _BareStart(compute_dtype)
    return _ReadStart(student, compute_dtype)


class _BareStart(AdapterOffTeacher):
    """What the adapter was put on."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, compute_dtype: torch.dtype | None) -> None:
        self.compute_dtype = compute_dtype


class _ReadStart(FrozenTeacher):
    """The student's folder, read again; in CPU memory while nobody asks."""

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
