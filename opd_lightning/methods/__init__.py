"""One LightningModule per method family."""

from opd_lightning.methods.base import DistillationModule
from opd_lightning.methods.opd import OPD, FullVocabularyOPD
from opd_lightning.methods.sft import SFT

__all__ = ["OPD", "SFT", "DistillationModule", "FullVocabularyOPD"]
