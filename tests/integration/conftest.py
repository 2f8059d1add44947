"""Servers that several modules share: each start costs half a minute on a busy core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_lightning.rollouts.vllm_process import vllm_unavailable
from tests.servers import RunningServer

# So few tokens at once that long prompts are computed in chunks, which scoring allows.
CHUNKS = '{"max_num_batched_tokens": 64, "enable_chunked_prefill": true}'


@pytest.fixture(scope="session")
def _teacher_server(
    untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    if reason := vllm_unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("teacher_server")
    options = ("--max_length", "200", "--max_num_seqs", "64", "--engine_args", CHUNKS)
    server = RunningServer(untrained_lab / "lab/arithmetic/teacher", folder, *options)
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def teacher_server(_teacher_server: RunningServer) -> RunningServer:
    """Serves the untrained lab's teacher; a test may kill it."""
    if not _teacher_server.is_running():
        _teacher_server.restart().wait()
    return _teacher_server
