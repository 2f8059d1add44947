import os

import pytest
import torch

from opd_lightning.serving.vllm_process import launcher_variables


@pytest.mark.parametrize("before", [None, "0"])
def test_vllm_gets_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """With `trainer.devices: [2, 3]` Lightning's LOCAL_RANK is 0 and 1."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before is not None:
        monkeypatch.setenv("LOCAL_RANK", before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    with launcher_variables():
        assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("0", "2")
    assert (os.environ.get("RANK"), os.environ.get("LOCAL_RANK")) == (None, before)
