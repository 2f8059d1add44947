"""Plans of runs, and cost estimates without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.preflight.cost import in_seconds
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import process_memory
from opd_lightning.preflight.plan import Plan
from opd_lightning.preflight.traffic import push_traffic, step_traffic

CONFIG = Qwen3Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
HEAD = 512 * 64


def plan(layout: Layout, *, lora: bool = False, **changes: Any) -> Plan:
    model: Any
    with torch.device("meta"):
        model = Qwen3ForCausalLM(CONFIG)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    made = Plan(
        student=model,
        config=CONFIG,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        layout=layout,
        precision="bf16-mixed",
        checkpointing=True,
        on_gpu=False,
        rows=1,
        length=24,
        response=16,
        micro_batches=3,
        pushed=torch.bfloat16,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("ddp", Layout(world=8, shards=1, per_node=4, copies_gradients=True)),
        (DDPStrategy(gradient_as_bucket_view=True), Layout(world=8, shards=1, per_node=4)),
        (ModelParallelStrategy(8, 1), Layout(world=8, shards=8, per_node=4)),
    ],
    ids=["ddp", "ddp without copies", "fsdp2"],
)
def test_one_process_knows_the_layout_of_all(strategy: Any, layout: Layout) -> None:
    trainer = Trainer(accelerator="cpu", devices=4, num_nodes=2, strategy=strategy, logger=False)
    assert Layout.of(trainer) == layout


def test_groups_have_a_copy_of_the_weights_each() -> None:
    hsdp = pytest.importorskip("opd_lightning.models.sharding")
    strategy = hsdp.HSDPStrategy(shard_size=2)
    trainer = Trainer(accelerator="cpu", devices=4, num_nodes=2, strategy=strategy, logger=False)
    assert Layout.of(trainer) == Layout(world=8, shards=2, per_node=4)


def test_what_travels_under_hsdp() -> None:
    """Gathers and scatters as in a group alone, and each process's part of the gradients."""
    group, both = plan(Layout(world=2, shards=2)), plan(Layout(world=4, shards=2))
    gradients = 4 * sum(p.numel() for p in group.student.parameters())
    assert push_traffic(both) == push_traffic(group) == gradients / 2
    # An all-reduce of 2 processes sends what it adds up; 3 micro-batches.
    assert step_traffic(both) == step_traffic(group) | {"all_reduce": 3 * gradients / 2}
    assert process_memory(both) == process_memory(group)


def test_gradients_of_half_precision_weights_travel_in_float32_under_autocast() -> None:
    usual = plan(Layout(world=2, shards=2))
    half = replace(usual, student=usual.student.to(torch.bfloat16))
    assert len({p.dtype for p in half.student.parameters()}) == 1
    rest = HEAD + 64
    expected = step_traffic(plan(Layout(world=2, shards=2)))["reduce_scatter"] - 3 / 2 * 2 * rest
    assert step_traffic(half)["reduce_scatter"] == expected


def test_a_teacher_that_is_the_student_gathers_its_layers_once_more() -> None:
    read = plan(Layout(world=2, shards=2), readings=1)
    layers = sum(p.numel() for layer in read.units[0] for p in layer)
    more = step_traffic(read)["all_gather"] - step_traffic(plan(read.layout))["all_gather"]
    assert more == 3 * 2 * layers / 2


def test_a_frozen_head_has_no_gradient() -> None:
    full, lora = (process_memory(plan(Layout(), lora=x)).training["head"] for x in (False, True))
    assert full - lora == 4 * HEAD


def test_a_push_needs_the_largest_tensor_whole_and_once_in_the_engines_dtype() -> None:
    alone, sharded = (process_memory(plan(Layout(world=2, shards=n))).pushing for n in (1, 2))
    assert (alone["push"], sharded["push"]) == (2 * HEAD, (4 + 2) * HEAD)
    assert process_memory(plan(Layout(), pushed=None)).pushing == {"push": 0}


@pytest.mark.parametrize(
    ("layout", "on_gpu"), [(Layout(), False), (Layout(), True), (Layout(world=2, shards=2), True)]
)
def test_a_start_is_on_a_gpu_while_it_is_read_unless_it_is_sharded(
    layout: Layout, on_gpu: bool
) -> None:
    without, memory = (
        process_memory(plan(layout, on_gpu=on_gpu, compares_with_start=compares))
        for compares in (False, True)
    )
    weights = memory.always["weights"]
    comes_and_goes = on_gpu and layout.shards == 1
    assert memory.host - without.host == (weights if comes_and_goes else 0)
    assert memory.validation == ({"start": weights} if comes_and_goes else {})
    assert memory.always["start"] == (0 if comes_and_goes else weights)
    large = replace(memory, training={}, optimizer_step={}, pushing={})
    assert large.peak()["start"] == weights


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_engine_that_sleeps_is_not_there_while_a_step_trains(sleeps: bool) -> None:
    for engine in (1, 10**9):
        memory = process_memory(plan(Layout(), engine=engine, engine_sleeps=sleeps))
        always, push = sum(memory.always.values()), memory.pushing["push"]
        trains, awake = sum(memory.training.values()), engine + push
        working = max(trains, sum(memory.optimizer_step.values()))
        expected = max(working, awake) if sleeps else engine + max(working, push)
        assert sum(memory.peak().values()) == always + expected


@pytest.mark.parametrize(
    ("number", "text"), [(0.0123, "0.012 s"), (99.4, "99 s"), (99.6, "100 s"), (2517.0, "2,517 s")]
)
def test_seconds_are_never_powers_of_ten(number: float, text: str) -> None:
    assert in_seconds(number) == text
