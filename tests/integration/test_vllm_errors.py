"""What a user sees when vLLM, in the trainer's process, cannot go on."""

from typing import Any

import pytest
import torch

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import Request, Sampling, VLLMEngine
from opd_lightning.serving.vllm_process import vllm_unavailable
from tests.conftest import TinyModelDir

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_unavailable()), reason=str(vllm_unavailable())),
]


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


def test_what_ends_it_later(tiny_model_dir: TinyModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    engine = VLLMEngine()
    engine.start(ModelSource(str(tiny_model_dir())), max_length=64)

    def fails(error: Exception) -> Any:
        def generate(*_: Any, **__: Any) -> Any:
            raise error

        return generate

    outcomes: list[tuple[Exception, type[Exception], str]] = [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), RunStoppedError, "memory. Tried"),
        (EngineDeadError(), RunStoppedError, "vLLM's own processes have ended"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ]
    try:
        for error, kind, message in outcomes:
            monkeypatch.setattr(engine._llm, "generate", fails(error))
            with pytest.raises(kind, match=message):
                engine.generate([Request([3], 0)], Sampling(max_new_tokens=2))
    finally:
        engine.close()
