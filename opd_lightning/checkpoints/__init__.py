"""Checkpoints that are written atomically and verified before they are read."""

from opd_lightning.checkpoints.connector import CheckpointConnector
from opd_lightning.checkpoints.newest import LAST, needed, settle_folders
from opd_lightning.checkpoints.reading import restoring, whole
from opd_lightning.checkpoints.stepping_back import step_back
from opd_lightning.checkpoints.writing import save_last, write

__all__ = [
    "LAST",
    "CheckpointConnector",
    "needed",
    "restoring",
    "save_last",
    "settle_folders",
    "step_back",
    "whole",
    "write",
]
