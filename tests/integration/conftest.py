"""Servers shared by several modules; a start takes half a minute on a busy core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import Sampling, VLLMServerEngine
from tests.engine_contract import MAX_LENGTH, REQUESTS, assert_scored_by, reference_model
from tests.servers import WAITS, RunningServer

# A low limit, so that long prompts are computed in chunks.
CHUNKS = '{"max_num_batched_tokens": 64, "enable_chunked_prefill": true}'


@pytest.fixture(scope="session")
def _teacher_server(
    untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("teacher_server")
    options = ("--max_length", "200", "--max_num_seqs", "64", "--engine_args", CHUNKS)
    server = RunningServer(untrained_lab / "lab/arithmetic/teacher", folder, *options, warm=True)
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture
def teacher_server(_teacher_server: RunningServer) -> RunningServer:
    """Return a server of the untrained lab's teacher; a test may kill it."""
    if not _teacher_server.is_running():
        _teacher_server.restart().wait()
    return _teacher_server


@pytest.fixture(scope="session")
def _rollout_server(
    tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    options = ("--weights", "pushed", "--max_length", str(MAX_LENGTH))
    folder = tmp_path_factory.mktemp("server")
    server = RunningServer(tiny_model_dir(), folder, *options, warm=True)
    try:
        _check_first_weights(server.wait(), tiny_model_dir())
        yield server
    finally:
        server.kill()


def _check_first_weights(server: RunningServer, folder: Path) -> None:
    """Check the server's log-probs before any push."""
    engine = VLLMServerEngine([server.url], key_file=str(server.key_file), **WAITS)
    engine.start(ModelSource(str(folder)), max_length=MAX_LENGTH)
    assert engine.version == -1
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    assert_scored_by(reference_model(folder), REQUESTS, engine.generate(REQUESTS, greedy), greedy)
    with pytest.raises(UserError, match=r"engine\.push_folder: got null"):
        engine.load_weights(0, [])
    engine.close()


@pytest.fixture(scope="module")
def rollout_server(_rollout_server: RunningServer) -> RunningServer:
    """Return a server of a tiny model with pushes; the last test of a module may end it."""
    if not _rollout_server.is_running():
        _rollout_server.restart().wait()
    return _rollout_server
