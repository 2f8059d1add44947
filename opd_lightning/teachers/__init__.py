"""Teachers score what students wrote; one file per kind, all answer `score`."""

from opd_lightning.teachers.base import Ask, DistributionTeacher, Teacher, TopKTeacher
from opd_lightning.teachers.by_domain import ByDomainTeacher
from opd_lightning.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.of_student import AdapterOffTeacher, EMATeacher

__all__ = [
    "AdapterOffTeacher",
    "Ask",
    "ByDomainTeacher",
    "CrossTokenizerTeacher",
    "DistributionTeacher",
    "EMATeacher",
    "FrozenTeacher",
    "Teacher",
    "TopKTeacher",
]
