"""Shared cluster of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster of two nodes."""
    if reason := unavailable():
        pytest.skip(reason)
    cluster = Cluster(Path(tmp_path_factory.mktemp("cluster")))
    yield cluster
    cluster.close()
