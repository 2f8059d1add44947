"""Measurements of the study of Many Faces of OPD (2605.11182)."""
