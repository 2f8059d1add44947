"""What a user sees when vLLM, in the trainer's process, does not start."""

from typing import Any

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import VLLMEngine
from tests.conftest import TinyModelDir

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqs": 3}, "unexpected keyword argument 'max_seqs'; change the engine's"),
        ({"max_num_batched_tokens": 3}, "Value error, max_num_batched_tokens .3. is smaller than"),
    ],
)
def test_settings_that_it_refuses(
    arguments: dict[str, Any], message: str, tiny_model_dir: TinyModelDir
) -> None:
    engine = VLLMEngine(engine_args=arguments)
    with pytest.raises(UserError, match=f"vLLM does not start: .*{message}") as raised:
        engine.start(ModelSource(str(tiny_model_dir())), max_length=64)
    assert "\n" not in str(raised.value)
    assert "pydantic" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's memory")
def test_memory_that_is_not_there(
    tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    message = "vLLM does not start: Available memory .* is less than requested memory for kv"
    try:
        with pytest.raises(UserError, match=message):
            VLLMEngine().start(ModelSource(str(tiny_model_dir())), max_length=64)
    finally:
        cleanup_dist_env_and_memory()
