"""Checks and estimates of `opd check`: tokens, engine and trainer agreement, memory, cost."""
