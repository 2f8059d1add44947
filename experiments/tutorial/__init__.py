"""Measurements of the study of what tutorials say."""
