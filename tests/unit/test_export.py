"""Exported folders: responses end where the student's did, and any folder's settings are saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    InklingTextConfig,
)

from opd_lightning.commands.export import write_hf_folder
from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import load_causal_lm
from opd_lightning.models.generation_settings import valid_settings
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from tests.conftest import TinyModelDir, write_tokenizer
from tests.families import family_config, write_family

FILES = ("config.json", "generation_config.json")


@pytest.fixture
def start(tiny_model_dir: TinyModelDir, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir(layers=1), tmp_path / "start"))


def exported(start: Path, **settings: Any) -> Path:
    student = Student(str(start), **settings)
    student.load()
    folder = start.parent / "exported"
    write_hf_folder(student, folder)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def change(folder: Path, name: str, **settings: Any) -> None:
    (folder / name).write_text(json.dumps(read(folder, name) | settings))


def test_eos_tokens_and_template_are_exported(start: Path) -> None:
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    folder = exported(start, eos_tokens=[";", "<eos>"], chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids([";", "<eos>"])
    assert tokenizer.eos_token == ";"
    assert tokenizer.chat_template == template
    assert [read(folder, name)["eos_token_id"] for name in FILES] == [ends, ends]
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == ends
    assert ModelSource(str(folder)).eos_ids == tuple(sorted(ends))


def test_the_tokenizer_s_end_is_exported_beside_the_generation_config_s(start: Path) -> None:
    """A run ends responses at both, so generate() must."""
    change(start, "generation_config.json", eos_token_id=7)
    folder = exported(start)
    assert [read(folder, name)["eos_token_id"] for name in FILES] == [[1, 7], [1, 7]]


def test_a_folder_s_own_end_stays_as_it_is(start: Path) -> None:
    folder = exported(start)
    for name in FILES:
        assert read(folder, name)["eos_token_id"] == read(start, name)["eos_token_id"] == 1


def test_an_architecture_with_one_end_gets_the_first(start: Path) -> None:
    student = Student(str(start), eos_tokens=[";", "<eos>"])
    student.load()
    student.model.config = InklingTextConfig()
    write_hf_folder(student, start.parent / "exported")
    (first, _) = read(start.parent / "exported", "generation_config.json")["eos_token_id"]
    assert read(start.parent / "exported", "config.json")["eos_token_id"] == first


@pytest.mark.parametrize("name", FILES)
def test_settings_of_sampling_are_saved_with_do_sample(name: str, start: Path) -> None:
    if name == "config.json":  # read in place of generation_config.json, if that is missing
        (start / "generation_config.json").unlink()
    change(start, name, temperature=0.9, top_p=0.6)
    settings = read(exported(start), "generation_config.json")
    assert settings["do_sample"] is True
    assert (settings["temperature"], settings["top_p"]) == (0.9, 0.6)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"temperature": 0.9, "do_sample": False, "max_length": 99}, {"temperature"}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping", "length_penalty"}),
        ({"early_stopping": True, "num_beams": 4}, set()),
        ({"pad_token_id": -1, "repetition_penalty": 1.1}, {"pad_token_id"}),
        ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
        ({"output_scores": True, "num_beams": 2}, {"output_scores"}),
        ({"num_return_sequences": 3, "do_sample": True, "top_k": 9}, set()),
    ],
)
def test_settings_without_effect_are_left_out(
    given: dict[str, Any], refused: set[str], tmp_path: Path
) -> None:
    valid_settings(GenerationConfig(**given)).save_pretrained(tmp_path)
    saved = read(tmp_path, "generation_config.json")
    del saved["transformers_version"]
    assert saved == {name: value for name, value in given.items() if name not in refused}


def test_changed_settings_are_reported(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(start)
    assert "generation_config" not in capsys.readouterr().err
    shutil.rmtree(start.parent / "exported")
    change(start, "generation_config.json", temperature=0.9, early_stopping=True)
    exported(start)
    said = [x for x in capsys.readouterr().err.splitlines() if "generation_config" in x]
    assert [x for x in said if x.startswith("opd: ")] == [
        "opd: generation_config.json: written with do_sample: true, for the sake of temperature",
        "opd: generation_config.json: written without early_stopping: True, which transformers "
        "does not save",
    ]


def test_a_model_that_also_reads_images_keeps_its_processor(tmp_path: Path) -> None:
    start = tmp_path / "start"
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=family_config("gemma3_text").to_dict(),
        vision_config=eyes,
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(start)
    write_tokenizer(start)
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 7}}
    (start / "preprocessor_config.json").write_text(json.dumps(processor))
    size = AutoImageProcessor.from_pretrained(exported(start)).size
    assert (size["height"], size["width"]) == (28, 7)


def write_fp8(folder: Path, side: int = 32) -> None:
    """Write a Llama whose layers are stored in FP8, with a scale for every block."""
    weights = {}
    for name, weight in load_file(write_family(folder, "llama") / "model.safetensors").items():
        weights[name] = weight
        if weight.ndim == 2 and ".layers." in name:
            blocks = weight.unflatten(1, (-1, side)).unflatten(0, (-1, side))
            scales = blocks.abs().amax((1, 3)) / 448
            stored = (blocks / scales[:, None, :, None]).flatten(0, 1).flatten(1)
            weights[name] = stored.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [side, side]}
    change(folder, "config.json", quantization_config=method)


@torch.no_grad()
def test_weights_that_were_dequantized_are_exported_as_they_are(tmp_path: Path) -> None:
    write_fp8(tmp_path / "start")
    student = Student(str(tmp_path / "start"))
    student.load()
    for weight in student.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.01)
    write_hf_folder(student, tmp_path / "out")
    again = load_causal_lm(ModelSource(str(tmp_path / "out")), dtype="float32")
    expected = dict(student.model.named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_a_student_that_stays_quantized_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fp8(tmp_path / "start")
    load = AutoModelForCausalLM.from_pretrained

    def on_a_gpu(*args: Any, **kwargs: Any) -> Any:
        model, found = load(*args, **kwargs)
        method = SimpleNamespace(quant_method="fp8")
        model.hf_quantizer = SimpleNamespace(quantization_config=method)
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_a_gpu)
    with pytest.raises(UserError, match=r"stay quantized on this machine \(fp8\).*not quantized"):
        Student(str(tmp_path / "start")).load()
    load_causal_lm(ModelSource(str(tmp_path / "start")), dtype="float32")  # such as a teacher
