"""Architectures that vLLM computes differently are refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import VLLMEngine
from opd_lightning.serving.architectures import check_architecture
from opd_lightning.serving.vllm_errors import model_errors
from tests.families import family_config, family_model


def test_a_text_model_in_the_folder_of_a_larger_one_is_refused(tmp_path: Path) -> None:
    """transformers trains the text model alone, which vLLM would look for under other names."""
    from transformers import Qwen3_5Config

    for architecture, is_refused in (("Qwen3_5ForConditionalGeneration", True), (None, False)):
        config = Qwen3_5Config(architectures=[architecture] if architecture else None)
        config.save_pretrained(tmp_path)
        source = ModelSource(str(tmp_path), role="student")
        if is_refused:
            with pytest.raises(UserError, match=r"vLLM loads Qwen3_5ForCond.*Qwen3_5ForCausalLM"):
                check_architecture(source, on_gpu=True, pushed=True)
        else:
            check_architecture(source, on_gpu=True, pushed=True)


@pytest.mark.parametrize(
    ("on_gpu", "softcap", "is_refused"),
    [(False, 50.0, True), (False, None, False), (True, 50.0, False)],
)
def test_capped_attention_is_refused_on_the_cpu(
    on_gpu: bool, softcap: float | None, is_refused: bool, tmp_path: Path
) -> None:
    family_config("gemma2", attn_logit_softcapping=softcap).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), role="student")
    if not is_refused:
        check_architecture(source, on_gpu=on_gpu, pushed=True)
        return
    with pytest.raises(UserError, match=r"^student .*attn_logit_softcapping.*HFEngine"):
        check_architecture(source, on_gpu=on_gpu, pushed=True)


def test_weights_that_vllm_would_not_reload_are_refused(tmp_path: Path) -> None:
    family_config("gpt_oss").save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), role="student")
    with pytest.raises(UserError, match="vLLM keeps the old attention sinks of gpt_oss"):
        VLLMEngine().check(source, max_length=32)
    check_architecture(source, on_gpu=True, pushed=False)


@pytest.mark.vllm
def test_transformers_classes_are_not_shared_with_vllm(tmp_path: Path) -> None:
    for family, is_refused in (("olmo2", True), ("llama", False)):
        family_model(family).save_pretrained(tmp_path)
        source = ModelSource(str(tmp_path))
        if is_refused:
            with pytest.raises(UserError, match="no model of its own for Olmo2ForCausalLM"):
                VLLMEngine().check(source, max_length=32)
        else:
            VLLMEngine().check(source, max_length=32)


def test_what_vllm_lacks_is_told_in_one_line() -> None:
    def vllms(name: str) -> dict[str, Any]:
        """A module in whose function a dictionary lacks a key."""
        module: dict[str, Any] = {"__name__": name}
        exec("def load():\n    return {}['layers.1.bias']", module)
        return module

    told = r"cannot reload this model: KeyError: 'layers\.1\.bias'"
    with pytest.raises(UserError, match=told), model_errors("reload"):
        vllms("vllm.models.some")["load"]()
    with pytest.raises(KeyError), model_errors("reload"):
        vllms("opd_lightning.models.ours")["load"]()
