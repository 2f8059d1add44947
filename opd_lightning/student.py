"""Old path of `opd_lightning.models.student`, which saved configurations name."""

from opd_lightning.models.student import Student

__all__ = ["Student"]
