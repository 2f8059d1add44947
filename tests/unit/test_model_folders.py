"""Damaged model folders, each refused in one line that names the file, before weights load."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_lightning.errors import UserError
from opd_lightning.models import strict_json
from opd_lightning.models.folder import check_weights
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.run.model_checks import check_usable
from tests.conftest import TinyModelDir

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model_dir: TinyModelDir, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir(), tmp_path / "model")


def check(folder: Path) -> None:
    """Run the checks of a run before weights load."""
    student = Student(str(folder))
    check_usable(student.source)
    _ = student.source.pad_id
    student.check()


def change(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def cut(folder: Path, size: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])


def index(folder: Path, **shards: Any) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


def pickled(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


ENTRY = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "more": 1}}'

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in the tensors": (lambda f: cut(f, -1000), WEIGHTS),
    "cut in the header": (lambda f: cut(f, 100), WEIGHTS),
    "cut in the length": (lambda f: cut(f, 5), WEIGHTS),
    "empty": (lambda f: cut(f, 0), WEIGHTS),
    "longer than it says": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"),
        WEIGHTS,
    ),
    "header is no JSON": (write(WEIGHTS, b"\4\0\0\0\0\0\0\0[{]}"), WEIGHTS),
    "header is nested deeply": (
        write(WEIGHTS, (5000).to_bytes(8, "little") + b"[" * 5000),
        WEIGHTS,
    ),
    "header has an unknown key": (
        write(WEIGHTS, len(ENTRY).to_bytes(8, "little") + ENTRY),
        "unknown key 'more'",
    ),
    "header lists no offsets": (write(WEIGHTS, b'\x08\0\0\0\0\0\0\0{"a": 1}'), WEIGHTS),
    "weights are a pointer": (write(WEIGHTS, POINTER), WEIGHTS),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "got no weights"),
    "index names a missing shard": (lambda f: index(f, a="model-00001-of-2.safetensors"), "-of-2"),
    "index names a number": (lambda f: index(f, a=1), "names '1', which is no file"),
    "index with other metadata": (
        lambda f: [
            make(f)
            for make in (
                lambda f: index(f, a="b.safetensors"),
                lambda f: change(f, f"{WEIGHTS}.index.json", metadata="x"),
            )
        ],
        "metadata",
    ),
    "index is empty": (lambda f: index(f), "index.json"),
    "cut archive": (lambda f: pickled(f, b"PK\3\4" + bytes(50)), "pytorch_model.bin"),
    "empty archive": (lambda f: pickled(f, b""), "pytorch_model.bin"),
    "vocabulary of another size": (lambda f: change(f, "config.json", vocab_size=99), "vocab_size"),
    "another width": (lambda f: change(f, "config.json", hidden_size=32), "config.json"),
    "context is a text": (
        lambda f: change(f, "config.json", max_position_embeddings="x"),
        "max_position_embeddings",
    ),
    "context is nothing": (
        lambda f: change(f, "config.json", max_position_embeddings=0),
        "max_position_embeddings",
    ),
    "more layers than tensors": (
        lambda f: change(f, "config.json", num_hidden_layers=9999, layer_types=None),
        "num_hidden_layers is 9999, and the folder holds",
    ),
    "more layers than can be listed": (
        lambda f: change(f, "config.json", num_hidden_layers=10**9, layer_types=None),
        "says num_hidden_layers is 1000000000",
    ),
    "generation settings that are none": (
        lambda f: change(f, "generation_config.json", max_new_tokens=-1),
        "generation_config.json",
    ),
    "no heads": (lambda f: change(f, "config.json", num_attention_heads=0), "config.json"),
    "text for a number": (lambda f: change(f, "config.json", hidden_size="x"), "config.json"),
    "unknown model": (lambda f: change(f, "config.json", model_type="nobodys"), "config.json"),
    "configuration is a list": (write("config.json", "[]"), "config.json"),
    "configuration is huge": (lambda f: os.truncate(f / "config.json", 2**28 + 1), "at most"),
    "configuration is cut": (write("config.json", '{"model_type": "qw'), "config.json"),
    "configuration with a key twice": (
        write("config.json", '{"model_type": "qwen3", "model_type": "gpt2"}'),
        "'model_type' is set twice",
    ),
    "configuration is a pointer": (write("config.json", POINTER), "config.json"),
    "tokenizer is cut": (write("tokenizer.json", '{"version": "1'), "tokenizer.json"),
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), "tokenizer.json"),
    "tokenizer has no model": (write("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer settings are cut": (write("tokenizer_config.json", "{"), "tokenizer_config.json"),
    "generation settings are cut": (write("generation_config.json", "{"), "generation_config.json"),
    "EOS as lists": (
        lambda f: change(f, "generation_config.json", eos_token_id=[[1], [2]]),
        "eos_token_id",
    ),
    "architectures are a truth": (
        lambda f: change(f, "config.json", architectures=True),
        "architectures",
    ),
    "a token's id is too large": (
        lambda f: change(f, "tokenizer.json", added_tokens=[{"id": 2**31, "content": "x"}]),
        "the id of a token is 2147483648",
    ),
    "EOS beyond the vocabulary": (
        lambda f: change(f, "generation_config.json", eos_token_id=2**63),
        "eos_token_id",
    ),
    "EOS as text": (
        lambda f: change(f, "generation_config.json", eos_token_id="<eos>"),
        "eos_token_id",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_is_refused_by_name(folder: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError) as refused:
        check(folder)
    line = str(refused.value)
    assert said in line
    assert "student" in line
    assert "\n" not in line
    assert len(line) <= 400 + len(str(folder))


def test_weights_of_another_kind_are_refused(folder: Path) -> None:
    """Integers would be read as the numbers that they are, not as the bits of weights."""
    tensors = load_file(folder / WEIGHTS)
    name = "model.norm.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name}.* I32"):
        check(folder)
    change(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert check_weights(folder, "student")[name].dtype == "I32"


def test_a_panic_of_a_library_is_refused(folder: Path) -> None:
    class PanicException(BaseException):
        """What libraries in Rust raise."""

    class Panicking:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            raise PanicException("index out of bounds")

    with pytest.raises(UserError, match="index out of bounds"):
        ModelSource(str(folder))._load(Panicking, ("tokenizer.json",))


def test_whole_folders_are_read(folder: Path) -> None:
    check(folder)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    index(folder, **{n: f"{i % 2}.safetensors" for i, n in enumerate(names)})
    for i in range(2):
        part = {n: tensors[n] for n in names[i::2]}
        save_file(part, folder / f"{i}.safetensors", metadata={"format": "pt"})
    check(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    check(folder)
    student = Student(str(folder))
    student.load()
    assert student.model.get_input_embeddings().weight.equal(tensors["model.embed_tokens.weight"])


def test_a_pad_id_outside_of_the_vocabulary_is_not_used(folder: Path) -> None:
    """Padding is masked, so any id that can be embedded does."""
    source = ModelSource(str(folder))
    source.tokenizer.add_special_tokens({"pad_token": "<another>"})
    assert source.tokenizer.pad_token_id == source.config.vocab_size
    assert source.pad_id < source.config.vocab_size


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_are_those_that_generate_reads(folder: Path, file: str) -> None:
    """Without a generation_config.json, `generate` and vLLM read config.json."""
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    change(folder, file, eos_token_id=[5, 7])
    source = ModelSource(str(folder), role="student")
    assert source.eos_ids == (source.tokenizer.eos_token_id, 5, 7)
    for wrong in ([], [5, 64]):
        change(folder, file, eos_token_id=wrong)
        with pytest.raises(UserError, match=re.escape(f"{file}: got {wrong}")):
            _ = ModelSource(str(folder), role="student").eos_ids


def test_an_end_outside_of_the_vocabulary_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder, "config.json", eos_token_id=None)
    source = ModelSource(str(folder), role="student")
    source.tokenizer.add_special_tokens({"eos_token": "<another>"})
    with pytest.raises(UserError, match="EOS token is id 64"):
        check_usable(source)


def test_a_key_that_is_set_twice_among_many_is_found_at_once() -> None:
    keys = ",".join(f'"{i}":0' for i in range(60_000))
    began = time.process_time()
    with pytest.raises(ValueError, match="the key '59999' is set twice"):
        strict_json.loads(f'{{{keys},"59999":1}}')
    assert time.process_time() - began < 5
