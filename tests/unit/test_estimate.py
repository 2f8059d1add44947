"""`opd estimate`: figures of runs whose models are a config.json, against measured ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.errors import NotReadyError, UserError
from opd_lightning.methods import GOLD, OPD, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.preflight.estimate import Lengths
from opd_lightning.preflight.operations import forward_operations, matrix_weights
from opd_lightning.preflight.speeds import Decoder, Gpu
from opd_lightning.preflight.widths import Widths
from opd_lightning.rollouts import HFEngine, Sampling, VLLMEngine, VLLMServerEngine
from opd_lightning.rules import HighEntropyMask, TruncatedImportance
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import (
    AdapterOffTeacher,
    ByDomainTeacher,
    CrossTokenizerTeacher,
    EMATeacher,
    FrozenTeacher,
    Teacher,
)
from tests.described import TINY, describe

PROMPT, RESPONSE = 16, 48
Values = dict[str, Any]
Estimate = Callable[..., Values]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return describe(tmp_path / "model", TINY)


@pytest.fixture
def estimate(folder: str, capfd: pytest.CaptureFixture[str]) -> Estimate:
    """Return the numbers of `Trainer.estimate`, by subject."""

    def run(
        *,
        teacher: Teacher | None = None,
        student: dict[str, Any] | None = None,
        method: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        kind: type[OPD | DivergenceOPD | GOLD] = OPD,
        demonstrator: TeacherSampler | None = None,
        **data: Any,
    ) -> Values:
        settings: dict[str, Any] = {"accelerator": "cpu", "max_steps": 100, "logger": False}
        lightning = Trainer(**settings, enable_progress_bar=False, **(trainer or {}))
        module = kind(
            Student(folder, **(student or {})),
            teacher or FrozenTeacher(folder),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
            **(method or {}),
        )
        given: dict[str, Any] = {
            "teacher": demonstrator,
            "engine": HFEngine(),
            "sampling": Sampling(max_new_tokens=RESPONSE),
            "prompts_per_step": 8,
        }
        asked = {"prompt_tokens": PROMPT, "longest_prompt": 2 * PROMPT, **(options or {})}
        lightning.estimate(module, RolloutDataModule(**given | data), **asked, json=True)
        printed = json.loads(capfd.readouterr().out)
        findings = printed["findings"]
        levels: Any = {"verdict": printed["verdict"]}
        levels |= {"levels": {finding["subject"]: finding["level"] for finding in findings}}
        return levels | {finding["subject"]: finding["values"] for finding in findings}

    return run


def described(folder: str) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(config), config


def test_weights_gradients_and_optimiser_are_those_of_the_loaded_model(
    estimate: Estimate, folder: str
) -> None:
    found = estimate()
    model, _ = described(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    weights = list(model.parameters())
    states = [x for state in optimizer.state.values() for x in state.values()]

    def nbytes(tensors: list[Any]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    memory = found["memory (estimate)"]
    assert memory["weights_bytes"] == nbytes(weights)
    assert memory["gradients_bytes"] == nbytes([w.grad for w in weights])
    assert memory["optimizer_bytes"] == nbytes(states)
    assert memory["teachers_bytes"] == nbytes(weights)
    assert set(found["models"].values()) == {sum(w.numel() for w in weights)}


def test_shards_divide_what_a_process_holds(estimate: Estimate) -> None:
    whole = estimate(prompts_per_step=16)["memory (estimate)"]
    strategy = ModelParallelStrategy(data_parallel_size=16, tensor_parallel_size=1)
    layout = {"devices": 8, "num_nodes": 2, "strategy": strategy}
    shard = estimate(prompts_per_step=16, trainer=layout)["memory (estimate)"]
    for name in ("weights", "gradients", "teachers"):
        assert shard[f"{name}_bytes"] == pytest.approx(whole[f"{name}_bytes"] / 16, rel=0.1)


def operations(folder: str, rows: float, response: int = RESPONSE) -> tuple[float, float]:
    """Operations of a forward pass in layers and head, over some rows."""
    model, config = described(folder)
    matrices = matrix_weights(model, config)
    length = PROMPT + response
    layers = forward_operations(Widths.of(config), [length] * 8, 0, matrices) / 8 * rows
    return layers, forward_operations(Widths.of(config), [], rows * response)


@pytest.mark.parametrize(
    ("settings", "layers", "head", "teacher"),
    [
        ({}, 3, 4, 1),
        ({"student": {"gradient_checkpointing": True}}, 4, 4, 1),
        ({"student": {"lora": LoraConfig(r=2, target_modules="all-linear")},
          "teacher": AdapterOffTeacher()}, 2, 3, 1),
        ({"teacher": EMATeacher(rate=0.0)}, 3, 4, 1),
        ({"method": {"rules": [HighEntropyMask()]}, "trainer": {"accumulate_grad_batches": 4}},
         3.75, 4.75, 1),
        ({"method": {"aggregation": "mask-mean"}, "trainer": {"accumulate_grad_batches": 4}},
         3, 4, 1),  # divided at the end of the step
        ({"kind": DivergenceOPD, "method": {"rules": [HighEntropyMask()]},
          "trainer": {"accumulate_grad_batches": 2}}, 3.5, 4.5, 1.5),
    ],
    ids=["plain", "checkpointing", "lora", "ema", "scored ahead", "divided", "compared"],
)  # fmt: skip
def test_passes_of_a_step(
    settings: dict[str, Any],
    layers: float,
    head: float,
    teacher: float,
    estimate: Estimate,
    folder: str,
) -> None:
    gpu = Gpu()
    time = estimate(**settings)["time (assumed speeds)"]
    inner, outer = operations(folder, rows=8)
    lora = "lora" in settings.get("student", {})
    # Adapters are matrices too.
    tolerance = 0.1 if lora else 1e-9
    student = (layers * inner + head * outer) / (gpu.peak * gpu.training)
    assert time["student_seconds"] == pytest.approx(student, rel=tolerance)
    scored = teacher * (inner + outer) / (gpu.peak * gpu.scoring)
    assert time["teachers_seconds"] == pytest.approx(scored, rel=tolerance)
    step = time["write_seconds"] + time["student_seconds"] + time["teachers_seconds"]
    assert time["step_seconds"] == pytest.approx(step)
    assert time["hours"] == pytest.approx(100 * step / 3600)


def test_teachers_by_domain_share_the_rows(estimate: Estimate, folder: str) -> None:
    one = estimate()["time (assumed speeds)"]["teachers_seconds"]
    parts: dict[str, Teacher] = {name: FrozenTeacher(folder) for name in "abc"}
    found = estimate(teacher=ByDomainTeacher(parts))
    assert found["time (assumed speeds)"]["teachers_seconds"] == pytest.approx(one)
    alone = estimate()["memory (estimate)"]["teachers_bytes"]
    assert found["memory (estimate)"]["teachers_bytes"] == 3 * alone


def test_a_teacher_with_other_tokens_is_counted(estimate: Estimate, folder: str) -> None:
    """For GOLD too, whose second forward pass of a step concerns whole distributions."""
    frozen, other = estimate(), estimate(kind=GOLD, teacher=CrossTokenizerTeacher(folder))
    for subject in ("memory (estimate)", "time (assumed speeds)"):
        assert other[subject] == frozen[subject]
    step = {"trainer": {"accumulate_grad_batches": 2}, "teacher": CrossTokenizerTeacher(folder)}
    ahead = {"rules": [HighEntropyMask(share=0.5)]}
    twice = estimate(kind=GOLD, method=ahead, **step)["time (assumed speeds)"]
    once = estimate(kind=GOLD, **step)["time (assumed speeds)"]
    assert twice["teachers_seconds"] == pytest.approx(1.5 * once["teachers_seconds"])


def test_tokens(estimate: Estimate) -> None:
    tokens = estimate(samples_per_prompt=2, options={"response_tokens": 10})["tokens (assumed)"]
    assert tokens == {
        "rollouts": 16,
        "prompt_tokens": 16 * PROMPT,
        "response_tokens": 160,
        "micro_batches": 1,
    }


def test_every_author_counts(estimate: Estimate, folder: str) -> None:
    """Of 8 prompts the teacher answers 2, three times each; every prompt has a recorded one."""
    found = estimate(
        method={"imitation": 0.1},
        samples_per_prompt=2,
        mix=RolloutMix(teacher=0.25, add_recorded=True),
        demonstrator=TeacherSampler(path=folder, engine=VLLMEngine(), samples=3),
    )
    assert found["tokens (assumed)"]["rollouts"] == 6 * 2 + 2 * 3 + 8
    assert found["memory (estimate)"]["demonstrators_engine_bytes"] == int(0.3 * 140 * 2**30)


def test_a_budget_of_tokens_decides_the_micro_batches(estimate: Estimate) -> None:
    found = estimate(max_tokens_per_micro_batch=128)["tokens (assumed)"]
    assert found["micro_batches"] == 8 * (PROMPT + RESPONSE) / 128


def test_engines_write_together_or_apart(estimate: Estimate, folder: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)

    def write(engine: Any, **more: Any) -> dict[str, float]:
        return estimate(engine=engine, **more)["time (assumed speeds)"]

    model, config = described(folder)
    weights = 2.0 * sum(p.numel() for p in model.parameters())
    decoder = Decoder(weights=weights, cached=2 * Widths.of(config).cache)

    def seconds(rows: float, at_once: float, gpus: int = 1) -> float:
        memory = Gpu().memory
        return replace(decoder, gpus=gpus).seconds(
            Gpu(), rows, prompt=PROMPT, mean=RESPONSE, most=RESPONSE, memory=memory, at_once=at_once
        )

    assert write(HFEngine(max_batch_size=2))["write_seconds"] == pytest.approx(seconds(8, 2))
    alone = write(VLLMEngine(max_num_seqs=4))["write_seconds"]
    assert alone == pytest.approx(seconds(8, 4))
    shared = write(VLLMEngine(max_num_seqs=4, tensor_parallel_size=2))["write_seconds"]
    assert shared == pytest.approx(seconds(8, 4, gpus=2))
    servers = VLLMServerEngine(
        servers=["http://127.0.0.1:1", "http://127.0.0.1:2"],
        key_file=str(tmp_path / "key"),
        push_folder=str(tmp_path / "push"),
    )
    found = write(servers, max_staleness=1, method={"rules": [TruncatedImportance()]})
    assert found["write_seconds"] == pytest.approx(seconds(4, 256))
    trains = found["student_seconds"] + found["teachers_seconds"]
    assert found["step_seconds"] == pytest.approx(max(found["write_seconds"], trains))


def test_decoding_reads_weights_and_cache() -> None:
    gpu = Gpu(peak=1e15, scoring=1.0, bandwidth=1e12, decoding=1.0)
    decoder = Decoder(weights=4e9, cached=1e5)
    # 10 rows of 1,000 tokens: 4 GB + 1 GB read, 40 G operations.
    assert decoder.step_seconds(gpu, 10, 1000) == pytest.approx(5e-3 + 4e-5)
    found = decoder.seconds(gpu, 20, prompt=500, mean=1000, most=3000, memory=9e9, at_once=10)
    full = 2 * 1000 * decoder.step_seconds(gpu, 10, 1000)
    last = 2000 * decoder.step_seconds(gpu, 1, 1000)
    assert found == pytest.approx(20 * 500 * 4e9 / 1e15 + full + last)
    # Less memory: 5e8 bytes beside the weights hold 3 sequences of 1,500 tokens and a third.
    assert decoder.sequences(4.5e9, 1500) == pytest.approx(5e8 / 1.5e8)


def test_what_does_not_fit_is_a_warning(estimate: Estimate) -> None:
    first = estimate()
    assert set(first["levels"].values()) == {"ok"}
    assert first["verdict"] == "Estimated, nothing was loaded."
    found = estimate(options={"gpu_memory": 0.001})
    assert {k for k, level in found["levels"].items() if level == "warning"} == {
        "memory (estimate)"
    }
    assert found["memory (estimate)"]["total_bytes"] > 0.001 * 2**30


def test_an_error_of_the_configuration_is_reported(
    estimate: Estimate, folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotReadyError):
        estimate(sampling=Sampling(top_p=0.9, max_new_tokens=8))
    (finding,) = json.loads(capfd.readouterr().out)["findings"]
    assert (finding["level"], finding["subject"]) == ("error", "data")
    (Path(folder) / "config.json").unlink()
    with pytest.raises(NotReadyError):
        estimate()
    findings = json.loads(capfd.readouterr().out)["findings"]
    assert "no config.json" in findings[0]["found"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_tokens": 0}, "--prompt_tokens"),
        ({"longest_prompt": 1}, "--longest_prompt"),
        ({"response_tokens": 0}, "--response_tokens"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"training_share": float("nan")}, "training"),
    ],
)
def test_assumptions_are_checked(options: dict[str, Any], named: str, estimate: Estimate) -> None:
    with pytest.raises(UserError, match=named):
        estimate(options=options)


def test_assumed_prompts_fit_the_context(
    estimate: Estimate, folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    describe(Path(folder), TINY | {"max_position_embeddings": RESPONSE + 80})
    unknown = {"prompt_tokens": None, "longest_prompt": None}
    found = estimate(options=unknown)["tokens (assumed)"]
    assert found["prompt_tokens"] == 8 * 80
    assert estimate(options=unknown | {"longest_prompt": 20})["tokens (assumed)"] == found | {
        "prompt_tokens": 8 * 20
    }
    with pytest.raises(NotReadyError):
        estimate(options=unknown, sampling=Sampling(max_new_tokens=RESPONSE + 80))
    (finding,) = json.loads(capfd.readouterr().out)["findings"]
    assert "max_new_tokens: got 128, but the student's context of 128" in finding["found"]


def test_prompts_of_usual_lengths_are_assumed_where_they_fit() -> None:
    unknown = Lengths(prompt=None, longest_prompt=None, response=None)
    assert unknown.prompts(40_000) == (512, 2048)
    assert Lengths(prompt=3000, longest_prompt=None, response=None).prompts(100) == (3000, 3000)
