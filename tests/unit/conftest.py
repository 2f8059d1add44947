"""Fixtures of unit tests."""

from collections.abc import Iterator

import pytest

from tests.refusals import refusal  # noqa: F401 - a fixture
from tests.served_chat import Serving


@pytest.fixture
def serve() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.stop()
