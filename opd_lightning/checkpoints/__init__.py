"""Checkpoints that cannot lose a run: written whole or not at all, checked before they are read."""

from opd_lightning.checkpoints.connector import LAST, CheckpointConnector
from opd_lightning.checkpoints.reading import whole
from opd_lightning.checkpoints.stepping_back import step_back
from opd_lightning.checkpoints.writing import save_last, write

__all__ = ["LAST", "CheckpointConnector", "save_last", "step_back", "whole", "write"]
