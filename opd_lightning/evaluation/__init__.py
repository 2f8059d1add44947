"""Suites that measure a student, during and outside of a run."""
