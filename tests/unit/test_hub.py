"""Hub names where the hub does not answer: one line, at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from opd_lightning.errors import UserError
from opd_lightning.models.hub import hub_unavailable
from opd_lightning.models.source import ModelSource
from tests.http_server import Server


@pytest.fixture(autouse=True)
def not_asked_before() -> Iterator[None]:
    hub_unavailable.cache_clear()
    yield
    hub_unavailable.cache_clear()


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_name_without_a_hub(
    offline: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens
    source = ModelSource("nobody/nothing", role="student")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as raised:
        source.config  # noqa: B018
    why = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 does not answer"
    assert "student model: 'nobody/nothing' is neither a folder here" in str(raised.value)
    assert why in str(raised.value)
    assert len(str(raised.value)) <= 400
    assert not caplog.records, "libraries did not retry"


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = Server(lambda body: (404, {}))
    try:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        assert hub_unavailable() is None
        assert not ModelSource("nobody/nothing").local_files_only
    finally:
        server.stop()
