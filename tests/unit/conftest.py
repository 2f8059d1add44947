"""Fixtures of unit tests."""

from tests.refusals import refusal  # noqa: F401 - a fixture
