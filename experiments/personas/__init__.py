"""Privileged texts that all rows share, and texts of single rows."""
