"""Suites that measure a student, in and outside of a run."""
