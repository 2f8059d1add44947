"""Teachers score what students wrote; one file per kind, all answer `score`."""

from opd_lightning.teachers.base import DistributionTeacher, Teacher
from opd_lightning.teachers.frozen import FrozenTeacher

__all__ = ["DistributionTeacher", "FrozenTeacher", "Teacher"]
