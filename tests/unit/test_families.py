"""Model families: each is read, sampled, adapted and merged as its own code computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Qwen2_5_VLConfig,
    ViTConfig,
)

from opd_lightning.errors import UserError
from opd_lightning.models.readout import (
    UnknownReadoutError,
    check_logits,
    measure,
)
from opd_lightning.models.source import ModelSource
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.teachers import FrozenTeacher
from tests.batches import make_batch, make_rollout
from tests.engine_contract import assert_scored_by
from tests.families import LENGTH, family_model, family_params, write_family

TINY_BERT = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
PROMPTS = ([5, 17, 33], [9, 40, 21, 60, 7, 12, 44])
RESPONSES = ([8, 30, 11, 52, 1], [25, 6])
# How they turn what the head returns into logits: (factor, softcap).
TRANSFORMS = {
    **dict.fromkeys(("cohere", "cohere2", "granite", "granitemoe", "hyperclovax"), (0.25, None)),
    "falcon_h1": (0.3, None),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma4_text", "nanochat", "recurrent_gemma", "vaultgemma"),
        (1.0, 2.0),
    ),
}
# Where "all-linear" is refused: by which words, and what can be trained.
NOT_ALL_LINEAR: dict[str, tuple[str, list[str]]] = {
    **dict.fromkeys(("llama4_text", "phimoe"), ("exclude_modules", ["q_proj", "o_proj"])),
    "falcon_h1": ("peft cannot adapt", ["q_proj", "in_proj"]),
    "mamba": ("peft cannot adapt", ["in_proj", "x_proj"]),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def own_logprobs(lm: Any) -> Tensor:
    """Log-probs `[N]` of the response tokens: each row alone, no padding, the model's logits."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logprobs = (logits[len(prompt) - 1 : -1].float() / 0.7).log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(rows)


def our_logprobs(student: Student) -> Tensor:
    rollouts = [
        make_rollout(r, prompt_ids=list(p)) for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    return student(make_batch(rollouts, temperature=0.7)).student.logprobs


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logprobs.sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", family_params())
def test_log_probs_and_gradients_are_the_models_own(
    folder_of: Callable[[str], Path], name: str
) -> None:
    student = Student(str(folder_of(name)))
    student.check()
    student.load()
    readout = measure(student.model)
    assert (readout.scale, readout.softcap) == TRANSFORMS.get(name, (1.0, None))
    model = reference(folder_of(name))
    ours, own = our_logprobs(student), own_logprobs(model)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    expected, found = gradients(model, own), gradients(student.model, ours)
    assert found.keys() == expected.keys()
    size = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], atol=1e-5 * size, rtol=1e-3)


@pytest.mark.parametrize("name", family_params())
def test_the_engine_samples_from_what_the_trainer_scores(
    folder_of: Callable[[str], Path], name: str
) -> None:
    engine = HFEngine(device="cpu")
    engine.start(ModelSource(str(folder_of(name))), max_length=LENGTH)
    requests = [Request(list(prompt), seed) for seed, prompt in enumerate(PROMPTS)]
    sampling = Sampling(temperature=0.7, max_new_tokens=12)
    completions = engine.generate(requests, sampling)
    assert_scored_by(reference(folder_of(name)), requests, completions, sampling)
    engine.close()


@pytest.mark.parametrize("name", family_params())
def test_lora_on_all_linear_layers_trains_and_merges(
    folder_of: Callable[[str], Path], name: str
) -> None:
    path = str(folder_of(name))
    targets: str | list[str] = "all-linear"
    if name in NOT_ALL_LINEAR:
        said, targets = NOT_ALL_LINEAR[name]
        with pytest.raises(UserError, match=said):
            Student(path, lora=LoraConfig(r=2, target_modules="all-linear")).check()
    assert_merges(path, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v3", "gpt_oss"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("glm4_moe", "mixtral", "qwen3_moe")),
    ],
)
def test_lora_on_fused_experts_trains_and_merges(
    folder_of: Callable[[str], Path], name: str
) -> None:
    lora = LoraConfig(
        r=2,
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    assert_merges(str(folder_of(name)), lora)


def test_lora_on_a_weight_by_its_parameter_merges(folder_of: Callable[[str], Path]) -> None:
    lora = LoraConfig(
        r=2,
        target_modules=["o_proj"],
        target_parameters=["lm_head.weight"],
        init_lora_weights=False,
    )
    assert_merges(str(folder_of("mixtral")), lora)


def assert_merges(path: str, lora: LoraConfig) -> None:
    """A student's weights, LoRA merged, are a plain model with the student's log-probs."""
    student = Student(path, lora=lora)
    student.check()
    student.load()
    before = our_logprobs(student)
    assert all("lora_" in n for n in gradients(student, before))
    merged, plain = dict(student.weights()), reference(Path(path))
    assert merged.keys() >= dict(plain.named_parameters()).keys()
    start = own_logprobs(plain)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(own_logprobs(plain), before, atol=1e-4, rtol=0)
    assert (before - start).abs().max() > 1e-2


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits.clamp(max=5), lambda logits: logits + 1, lambda logits: logits**3],
    ids=["cut", "shifted", "cubed"],
)
def test_an_unknown_transform_is_refused(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama")
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(UnknownReadoutError, match="turns a logit of"):
        measure(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_tokens_are_compared_in_any_precision(attention: str, dtype: torch.dtype) -> None:
    model = family_model("gemma2").to(dtype)
    model.opd_readout = measure(model)
    check_logits(model, attention=attention)
    off = type(model.opd_readout)(model.opd_readout.backbone, scale=0.7, softcap=2.0)
    model.opd_readout = off
    with pytest.raises(UnknownReadoutError, match="nats off its own"):
        check_logits(model, attention=attention)


def test_tokens_that_see_later_ones_are_refused() -> None:
    model = family_model("llama")
    forward = model.model.forward

    def backwards(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.flip(1)
        return output

    model.model.forward = backwards
    with pytest.raises(UnknownReadoutError, match="depend on later tokens"):
        check_logits(model, attention=None)


def test_noise_in_training_mode_is_refused() -> None:
    model = family_model("llama")
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda states: forward(states) * (1.1 if norm.training else 1.0)
    check_logits(model, attention=None)
    with pytest.raises(UnknownReadoutError, match="training mode"):
        check_logits(model, attention=None, training=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BartConfig(), "has an encoder"),
        (BertConfig(is_decoder=True, **TINY_BERT), "head"),
        (ViTConfig(), "no causal language model of text"),
        (Qwen2_5_VLConfig(), "no causal language model of text"),
    ],
    ids=["encoder-decoder", "masked", "vision", "multimodal"],
)
def test_other_models_are_refused_before_weights_load(
    config: Any, said: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=said) as refused:
        FrozenTeacher(str(tmp_path)).check_model(Student(str(tmp_path)))
    assert len(str(refused.value)) <= 400


def test_weights_that_are_not_finite_are_refused() -> None:
    model = family_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UnknownReadoutError, match="not finite"):
        check_logits(model, attention=None)
