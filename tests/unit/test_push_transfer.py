"""Refusals of pushes through vLLM's weight transfer before any request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.errors import UserError
from opd_lightning.rollouts import VLLMServerEngine

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("engine", "words", "refusal"),
    [
        # The servers' address file does not exist: a wait for it would not end.
        ("vllm_server_transfer", "nccl", "engine.push: got nccl, but this machine has no GPU"),
        ("vllm", "nccl", "'push' is not accepted"),
        ("vllm_server", "gloo", "engine.push_folder: got one with push: gloo; leave it out"),
    ],
)
def test_a_run_ends_in_one_line_before_weights_load(
    engine: str, words: str, refusal: str, in_lab: Path, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("opd_lightning.models.student.load_causal_lm", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    configs = (CONFIGS / "lab" / "opd.yaml", CONFIGS / "engine" / f"{engine}.yaml")
    arguments = [word for config in configs for word in ("--config", str(config))]
    arguments += [f"--data.engine.init_args.push={words}", "--trainer.logger=false"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert refusal in line


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::"])
def test_a_sender_that_would_listen_everywhere_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=r"engine\.push_host: got .*every interface"):
        VLLMServerEngine(["http://127.0.0.1:1"], push="gloo", push_host=host)


def test_an_address_without_a_transfer_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.push_host: got one with push: folder"):
        VLLMServerEngine(["http://127.0.0.1:1"], push_host="127.0.0.1")
