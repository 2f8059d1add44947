"""Checks of `opd check`, and what it and `opd estimate` compute of a run's cost."""
