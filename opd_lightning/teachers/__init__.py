"""Teachers, which score the student's responses; one file per kind."""

from opd_lightning.teachers.base import (
    Ask,
    DistributionTeacher,
    RecordedQuestion,
    Teacher,
    TopKTeacher,
)
from opd_lightning.teachers.by_domain import ByDomainTeacher
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.of_student import AdapterOffTeacher, EMATeacher
from opd_lightning.teachers.remote import RemoteTeacher

__all__ = [
    "AdapterOffTeacher",
    "Ask",
    "ByDomainTeacher",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "DistributionTeacher",
    "EMATeacher",
    "FrozenTeacher",
    "RecordedQuestion",
    "RemoteTeacher",
    "Teacher",
    "TopKTeacher",
]
