"""GGUF files as models: the same tokens, weights and stop tokens as in the model's own folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import load_causal_lm
from opd_lightning.models.source import ModelSource

gguf = pytest.importorskip("gguf", reason="the extra [gguf]")

SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>", "<|pad|>"]
MERGES = ["h e", "l l", "\u010a \u010a"]  # the last of two line breaks
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HEADS, KV_HEADS = 4, 2


class Made(NamedTuple):
    """A GGUF file and the model that it was written from."""

    file: Path
    model: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write(model, file)
    return Made(file, model)


def write(model: Any, file: Path) -> None:
    """Write a model as llama.cpp's converter does; leave it with the weights that are stored."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        base, kind = name.rsplit(".", 1)
        array = weight.detach().numpy()
        if "mlp" in name:  # with the rounding of the format
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            rounded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            assert abs(rounded - array).max() > 0
            weight.data.copy_(torch.from_numpy(rounded.copy()))
            name_there = f"{names.get_name(base)}.{kind}"
            writer.add_tensor(name_there, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            continue
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        if heads:  # rotary pairs are neighbours there and half a head apart here
            rows, width = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2)
            array = array.reshape(rows, width)
        writer.add_tensor(f"{names.get_name(base)}.{kind}", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "opd-lightning" / "gguf"


@torch.no_grad()
def test_a_file_is_the_model_that_it_was_written_from(
    made: Made, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ModelSource(str(made.file), role="student")
    text = "hello, h\u00e9ll\u00f6 \U0001f916\n\n12"  # a digit takes no line break along
    ids = source.tokenizer(text)["input_ids"]
    spelt = [bytes_to_unicode()[byte] for byte in text.encode()]
    for merged in (merge.replace(" ", "") for merge in MERGES):  # none uses another's result
        i = 0
        while i < len(spelt) - 1:
            if spelt[i] + spelt[i + 1] == merged:
                spelt[i : i + 2] = [merged]
            i += 1
    assert ids == [TOKENS.index(token) for token in spelt]
    assert source.tokenizer.decode(ids) == text
    chat = source.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert source.tokenizer(chat)["input_ids"][0] == SPECIAL.index("<|start|>")
    assert source.eos_ids == (0, 2)
    assert source.pad_id == 3
    assert source.context_length == 128

    inputs = torch.tensor([ids])
    expected = made.model(inputs).logits
    torch.testing.assert_close(load_causal_lm(source, dtype="float32")(inputs).logits, expected)
    # The folder is an ordinary one, for other programs and for vLLM.
    plain = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    torch.testing.assert_close(plain(inputs).logits, expected)
    assert "quantization_config" not in json.loads(Path(source.path, "config.json").read_text())
    assert GenerationConfig.from_pretrained(source.path).eos_token_id == [2, 0]

    # Converted once, and found by content: a folder with the file alone is the same model.
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert source.path == str(folder)
    assert ModelSource(str(made.file.parent)).path == str(folder)
    assert capsys.readouterr().err.count("is converted to") == 1


def test_what_is_no_gguf_model_is_refused(
    made: Made, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = made.file.read_bytes()
    files = {
        "two/a.gguf": raw,
        "two/b.gguf": raw,
        "text.gguf": b"no model",
        "pointer.gguf": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "m-00001-of-00002.gguf": raw,
        "cut.gguf": raw[: len(raw) // 2],
        "header.gguf": raw[:100],
        "other.gguf": raw.replace(b"llama", b"lxama"),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for name, reason in {
        "none.gguf": "no GGUF file at",
        "two": "several GGUF files",
        "text.gguf": "is no GGUF file",
        "pointer.gguf": "Git LFS pointer",
        "m-00001-of-00002.gguf": "one of several parts",
        "cut.gguf": "cannot read",
        "header.gguf": "cannot read",
        "other.gguf": "cannot read",
    }.items():
        with pytest.raises(UserError, match=rf"teacher model: .*{reason}") as caught:
            ModelSource(name, role="teacher").tokenizer  # noqa: B018
        assert "\n" not in str(caught.value)
        assert not [path for path in cache.glob("*") if path.is_dir()]  # nothing half made
    # A folder of transformers beside a GGUF file is read as ever.
    (tmp_path / "two" / "config.json").write_text("{}")
    assert ModelSource("two").path == "two"
